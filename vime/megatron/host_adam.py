"""Megatron's hybrid optimizer, with the updated weights on their way to the GPU while the next ones are updated.

Megatron 0.16 copies each fp32 weight on the host into the bf16 one on the GPU with a conversion into fresh pageable
memory and a transfer that nothing overlaps. Here the conversion goes into one of two pinned buffers, by all threads,
and the transfer runs during the next parameter's Adam step.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

BUFFERS, ELEMENTS = 2, 2**24
"""Pinned buffers of a rank, and the size of each: small enough to stay in the processor's cache on their way."""


class Staging:
    """Pinned buffers in turn, each free again when the transfer out of it has ended."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._buffers = [torch.empty(ELEMENTS, dtype=dtype, pin_memory=True) for _ in range(BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._next = 0

    def send(self, source: torch.Tensor, target: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Copy a host tensor into a GPU tensor of the buffers' type and as many elements, on a stream."""
        for piece, into in zip(source.view(-1).split(ELEMENTS), target.view(-1).split(ELEMENTS), strict=True):
            buffer, sent = self._buffers[self._next][: piece.numel()], self._sent[self._next]
            self._next = (self._next + 1) % BUFFERS
            sent.synchronize()
            buffer.copy_(piece)
            with torch.cuda.stream(stream):
                into.copy_(buffer, non_blocking=True)
                sent.record(stream)


class HostAdam(HybridDeviceOptimizer):
    """HybridDeviceOptimizer whose every parameter is updated on the host."""

    def _register_param_copy_back_gpu_hook(self) -> None:
        types = {gpu.dtype for gpu in self.cpu_copys_map_gpu_param.values()}
        if self.gpu_optimizer is not None or not self.overlap_cpu_optimizer_d2h_h2d or len(types) != 1:
            super()._register_param_copy_back_gpu_hook()
            return
        self._staging = Staging(types.pop())
        for optimizer in self.cpu_optimizers:
            optimizer.register_step_post_hook(self._send_back)

    def _send_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for copy in group["params"]:
                self._staging.send(copy.data, self.cpu_copys_map_gpu_param[copy].data, self._h2d_stream)

    def step(self, closure: Any = None) -> None:
        """One step; what the current stream does next sees the new weights."""
        self._h2d_stream.wait_stream(torch.cuda.current_stream())
        super().step(closure)
        torch.cuda.current_stream().wait_stream(self._h2d_stream)


def install() -> None:
    """Have Megatron build this optimizer where it would build its own: for whole parameters, then for its shards."""
    import megatron.core.optimizer as built_by
    from megatron.core.optimizer import distrib_optimizer

    built_by.HybridDeviceOptimizer = distrib_optimizer.HybridDeviceOptimizer = HostAdam
