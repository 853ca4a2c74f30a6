"""What of a trainer rank lies in its device's memory: parts that give it to the engine and take it back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch

from vime.megatron import backend
from vime.system.memory import memory_available

Part = Literal["weights", "gradients"]
PARTS: tuple[Part, ...] = ("weights", "gradients")


class Residence:
    """The data-parallel buffers of the chunks and the optimizer's states.

    `gradients` are the gradient buffers, dropped and zero again afterwards, and optimizer states that lie on the
    device, kept on the host. `weights` are the parameters, kept in pinned host memory. A processor's weights stay.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any) -> None:
        """`optimizer` is Megatron's, of the same chunks."""
        self._buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self._optimizer = optimizer
        self._cpu = backend.setup().cpu
        self._states_on_host: list[tuple[torch.Tensor, torch.device]] = []
        self.away: set[Part] = set()

    def leave(self, part: Part) -> None:
        """Free the part's device memory. Nothing when it is away already."""
        if part in self.away:
            return
        self._synchronise()
        for buffer in self._buffers:
            if part == "gradients":
                buffer.offload_to_cpu(move_params=False, move_grads=True)
            elif not self._cpu:
                buffer.offload_to_cpu(move_params=True, move_grads=False)
        if part == "gradients":
            self._states_leave()
        self.away.add(part)
        if not self._cpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def come_back(self, part: Part) -> None:
        """Take device memory for the part again. Nothing when it is there."""
        if part not in self.away:
            return
        for buffer in self._buffers:
            if part == "gradients":
                buffer.reload_from_cpu(move_params=False, move_grads=True)
            elif not self._cpu:
                buffer.reload_from_cpu(move_params=True, move_grads=False)
        if part == "gradients":
            for tensor, device in self._states_on_host:
                tensor.data = tensor.data.to(device, non_blocking=True)
            self._states_on_host.clear()
        self.away.discard(part)
        self._synchronise()

    def _states_leave(self) -> None:
        """Move moments and master weights off the device. Megatron's own way would also move back what never was
        there: the states of an optimizer on the host, and Adam's counts of steps."""
        for optimizer in self._optimizer.chained_optimizers:
            masters = itertools.chain(*getattr(optimizer, "shard_fp32_from_float16_groups", []))
            states = (value for state in optimizer.optimizer.state.values() for value in state.values())
            for tensor in (*masters, *states):
                if torch.is_tensor(tensor) and tensor.is_cuda:
                    self._states_on_host.append((tensor, tensor.device))
                    tensor.data = tensor.data.to("cpu")

    def _synchronise(self) -> None:
        if not self._cpu:
            torch.cuda.synchronize()


def free_bytes() -> tuple[int | None, int]:
    """Free bytes of this process's GPU (None without one) and available bytes of its host."""
    gpu = None if backend.setup().cpu else int(torch.cuda.mem_get_info()[0])
    return gpu, memory_available()
