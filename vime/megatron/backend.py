"""Which device the trainer runs on.

On a GPU with Transformer Engine nothing is changed; without a GPU the CPU shim is installed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from vime.errors import BadInput


@dataclass(frozen=True)
class Backend:
    """Device and collective library of this process, and whether Transformer Engine builds the layers."""

    device: torch.device
    distributed: Literal["gloo", "nccl"]
    transformer_engine: bool

    @property
    def cpu(self) -> bool:
        return self.device.type == "cpu"


_KNOWN_WARNINGS = (
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated"),
    (FutureWarning, r"`load_state_dict` is deprecated and will be removed"),
    (FutureWarning, r"Please use DTensor instead and we are deprecating ShardedTensor"),
    (UserWarning, r"TypedStorage is deprecated"),
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    (UserWarning, r"(Transformer Engine and )?Apex (is|are) not installed"),
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_scope"),
    (UserWarning, r"barrier\(\): using the device under current context"),
)
"""Warnings of megatron-core about itself: every rank would print them, and no user can do anything about them."""

_PRIMITIVES = "64"
"""Kernels that oneDNN keeps, 70 KB each: packed batches have ever new shapes, and its own limit is 1,024 of them."""


def ignore_known_warnings() -> None:
    """Keep `_KNOWN_WARNINGS` out of the log; all others are printed."""
    for category, message in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message, category)


@functools.cache
def setup() -> Backend:
    """The backend of this process; call it before any part of Megatron is imported or built.

    The GPU is the process's only visible one, or LOCAL_RANK among several.
    """
    ignore_known_warnings()
    if torch.cuda.is_available():
        count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        index = local if count > 1 else 0
        if index >= count:
            raise BadInput(f"LOCAL_RANK is {local} but {count} GPUs are visible: start one rank a GPU")
        torch.cuda.set_device(index)
        engine = importlib.util.find_spec("transformer_engine") is not None
        if not engine:
            _without_transformer_engine()
        return Backend(torch.device("cuda", index), "nccl", engine)
    # Where it is installed, Megatron takes its kernels without asking for a GPU; an import that fails, it expects.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from vime.megatron import cpu_shim

    cpu_shim.install()
    _without_transformer_engine()
    for variable in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(variable, _PRIMITIVES)
    return Backend(torch.device("cpu"), "gloo", False)


def _without_transformer_engine() -> None:
    """Three Megatron modules take Transformer Engine for granted when its wrapper can be imported, installed or not."""
    import megatron.core.optimizer.optimizer_config as optimizer_config
    import megatron.core.transformer.moe.moe_utils as moe_utils
    import megatron.core.transformer.multi_latent_attention as latent

    latent.HAVE_TE = False
    moe_utils.te_general_gemm = None
    # Its version is compared without asking whether there is one.
    optimizer_config.is_te_min_version = lambda version, check_equality=True: False
