"""A second set of weights on the host, exchanged with the model's while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


class HostWeights:
    """The chunks' parameters and persistent buffers as they were when this was made, in host memory."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._live = [tensor for chunk in chunks for tensor in _tensors(chunk)]
        self._kept = [self._host_copy(tensor) for tensor in self._live]

    @staticmethod
    def _host_copy(tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return copy.copy_(tensor.detach())

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has these weights; afterwards its own again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for live, kept in zip(self._live, self._kept, strict=True):
                # One tensor's worth of extra memory at a time.
                own = live.detach().clone()
                live.copy_(kept)
                kept.copy_(own)


def _tensors(chunk: Any) -> Iterator[torch.Tensor]:
    for name, tensor in chunk.state_dict(keep_vars=True).items():
        if torch.is_tensor(tensor) and not name.endswith("_extra_state"):
            yield tensor
