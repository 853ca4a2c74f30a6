"""Moves parts of a trainer rank between GPU and host, so that engines can have the GPU's memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from vime.megatron import backend
from vime.sync.ranks import Free, Part
from vime.system.memory import memory_available


class PinnedRoom:
    """Host memory for copies of device tensors, kept from one rollout to the next.

    It is registered with CUDA, so copies run at the speed of the bus: pageable memory took 15 s for 20 GB. torch's own
    pinned buffers would take the next power of two.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def places(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A host tensor for each, of its shape and type; valid until the next call with tensors of other sizes."""
        starts = list(itertools.accumulate((_padded(tensor.nbytes) for tensor in tensors), initial=0))
        if not tensors:
            return []
        if starts[-1] != self._memory.numel():
            self._release()
            self._memory = torch.empty(starts[-1], dtype=torch.uint8)
            torch.cuda.check_error(_cudart().cudaHostRegister(self._memory.data_ptr(), starts[-1], 0))
        return [
            self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(starts, tensors, strict=False)
        ]

    def _release(self) -> None:
        if self._memory.numel():
            torch.cuda.check_error(_cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._memory = torch.empty(0, dtype=torch.uint8)


def _cudart() -> Any:
    """CUDA's runtime; torch's types say that there may be none."""
    return torch.cuda.cudart()


def _padded(size: int) -> int:
    """A size as a multiple of 512 bytes, as every type and the copy engines like it."""
    return -(-size // 512) * 512


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
        self._room = PinnedRoom()
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
        leaving: list[torch.Tensor] = []
        for optimizer in self._optimizer.chained_optimizers:
            masters = itertools.chain(*getattr(optimizer, "shard_fp32_from_float16_groups", []))
            states = (value for state in optimizer.optimizer.state.values() for value in state.values())
            for tensor in (*masters, *states):
                if torch.is_tensor(tensor) and tensor.is_cuda:
                    leaving.append(tensor)
        for tensor, place in zip(leaving, self._room.places(leaving), strict=True):
            self._states_on_host.append((tensor, tensor.device))
            place.copy_(tensor.data, non_blocking=True)
            tensor.data = place

    def _synchronise(self) -> None:
        if not self._cpu:
            torch.cuda.synchronize()

    def free_bytes(self) -> Free:
        """Logical node, free bytes of this process's GPU (None without one), available bytes of its host."""
        gpu = None if self._cpu else int(torch.cuda.mem_get_info()[0])
        return self._node, gpu, memory_available()
