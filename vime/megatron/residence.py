"""Moves parts of a trainer rank between GPU and host, so that engines can have the GPU's memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from vime.megatron import backend
from vime.sync.ranks import Free, Part
from vime.system.memory import memory_available


class Residence:
    """The data-parallel buffers of the chunks and the optimizer's states.

    `gradients` are the gradient buffers, dropped and zero again afterwards, and optimizer states that lie on the
    device, kept on the host. `weights` are the parameters, kept in pinned host memory. A processor's weights stay.
    """

    def __init__(self, chunks: Sequence[Any], optimizer: Any, node: int = 0) -> None:
        """`optimizer` is Megatron's, of the same chunks; `node` is the logical node of this rank."""
        self._node = node
        self._buffers = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        self._optimizer = optimizer
        self._cpu = backend.setup().cpu
        self._states_on_host: list[tuple[torch.Tensor, torch.device]] = []
        self.away: set[Part] = set()

    def leave(self, part: Part) -> None:
        """Free the part's device memory; does nothing while the part is away."""
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
        """Take device memory for the part again; does nothing while the part is on the device."""
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

    def free_bytes(self) -> Free:
        """Logical node, free bytes of this process's GPU (None without one), available bytes of its host."""
        gpu = None if self._cpu else int(torch.cuda.mem_get_info()[0])
        return self._node, gpu, memory_available()
