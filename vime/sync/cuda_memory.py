"""GPU memory of one process in another one on the same GPU, as plain data: no pickle, no tensor per name.

A handle is what CUDA needs to map the memory, with torch's counter of its users, as JSON can carry it.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor


def share(memory: Tensor) -> list[Any]:
    """A handle of a contiguous CUDA tensor (uint8), for one other process, which has to map it and let it go again."""
    shared = memory.untyped_storage()._share_cuda_()
    return [*(_to_json(value) for value in shared), memory.storage_offset(), memory.numel()]


def map_shared(handle: list[Any]) -> Tensor:
    """The memory of a handle as uint8 on this process's GPU, which must be the same one. It is mapped until the tensor
    and all views of it are gone."""
    _, *shared, offset, size = (_from_json(value) for value in handle)
    # The sender's number of the GPU is not this process's.
    storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *shared)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage, offset, (size,), (1,))


def _to_json(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
