"""GPU memory shared between processes on one GPU through plain data: no pickle, no handle per tensor.

A handle is a JSON list of what CUDA needs to map the memory and of torch's reference counter.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor


def share(memory: Tensor) -> list[Any]:
    """Handle of a contiguous CUDA tensor (uint8) for one other process, which must map it and release it."""
    shared = memory.untyped_storage()._share_cuda_()
    return [*(_to_json(value) for value in shared), memory.storage_offset(), memory.numel()]


def map_shared(handle: list[Any]) -> Tensor:
    """Map a handle as a uint8 tensor on this process's GPU, which must be the sender's. The mapping lasts until the
    tensor and all its views are freed."""
    _, *shared, offset, size = (_from_json(value) for value in handle)
    # The sender's GPU index is dropped: this process may number the same GPU differently.
    storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *shared)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, offset, (size,), (1,))


def _to_json(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
