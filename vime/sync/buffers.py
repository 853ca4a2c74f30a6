"""Bucket buffers, two per receiver, in shared memory of a trainer's node or in GPU memory, with views of tensors."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vime.fp8.format import scale_shape
from vime.sync import cuda_memory
from vime.sync.parts import BUFFERS, EntrySlice
from vime.sync.schedule import Schedule
from vime.sync.segment import Segment, segment_name
from vime.sync.wire import Block, torch_type

Views = dict[int, dict[str, tuple[Tensor, Tensor | None]]]
"""Receiver to HF name to (tensor, scales), both views of the receiver's buffer."""


@dataclass
class Buffer:
    """Memory for one bucket of one receiver."""

    data: Tensor
    """uint8 [capacity]."""
    segment: Segment | None
    """Shared memory behind `data`; None on a GPU."""
    owned: bool
    """True if this rank has to remove the segment's name."""
    handle: list[Any] | None = None
    """CUDA handle with which another process maps it; None off the GPU."""

    def unlink(self) -> None:
        """Remove the segment's name; existing mappings stay."""
        if self.segment is not None and self.owned:
            self.segment.unlink()
            self.owned = False


class Buffers:
    """The buffers that one rank can access: those on its node, or on its GPU.

    All ranks call `prepare` at the same time. Host buffers of far receivers are kept between syncs: their names are not
    needed once the node's ranks have mapped them, and allocating pages costs more than filling them.
    """

    def __init__(self, schedule: Schedule, rank: int, run: str, device: torch.device) -> None:
        self._schedule, self._rank, self._run, self._device = schedule, rank, run, device
        self._now: dict[tuple[int, int], Buffer] = {}
        """(receiver, number of the buffer) to buffer."""
        self._kept: dict[tuple[int, int], Buffer] = {}
        self._makings, self._kept_since = 0, 0
        """Generation counter, and the generation of `_kept` (0: none)."""

    def prepare(self) -> None:
        """Create or reuse all buffers of a sync."""
        everyone = set(range(len(self._schedule.receivers)))
        far = {number for number in everyone if self._stays(number)}
        if far and self._all_kept():
            self._now |= self._kept
        elif far:
            self._makings += 1
            self._kept, self._kept_since = {}, 0
            self._make(far)
            barrier()
            for buffer in self._now.values():
                buffer.unlink()
            self._kept, self._kept_since = dict(self._now), self._makings
        if everyone - far:
            self._make(everyone - far)

    def of(self, bucket: int, receiver: int) -> Buffer:
        """A receiver's buffer for a bucket."""
        return self._now[receiver, bucket % BUFFERS]

    def views(self, bucket: int, receiver: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """HF name to (tensor, scales), views of the receiver's buffer."""
        slices, _ = self._schedule.slices(bucket, receiver)
        data = self.of(bucket, receiver).data
        return {entry_slice.entry.name: entry_views(data, entry_slice, self._schedule.block) for entry_slice in slices}

    def finish(self) -> None:
        """Free all buffers except those kept for the next sync."""
        for buffer in self._now.values():
            buffer.unlink()
        self._now.clear()

    def forget(self) -> None:
        """Drop the kept buffers too, because a failed sync may still read them."""
        self._kept, self._kept_since = {}, 0

    def _stays(self, number: int) -> bool:
        receiver = self._schedule.receivers[number]
        return not receiver.local and not receiver.on_gpu

    def _all_kept(self) -> bool:
        """True if all ranks keep buffers of the same generation; a rank that saw a sync fail keeps none."""
        times = torch.tensor([self._kept_since, -self._kept_since], device=self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(times, dist.ReduceOp.MIN)
        first, last = times.tolist()
        return first == -last > 0

    def _make(self, numbers: Collection[int]) -> None:
        """Create this rank's buffers of some receivers and map those created by other ranks of the node."""
        indices = range(min(BUFFERS, len(self._schedule.buckets)))
        for number in numbers:
            for index in indices:
                if self._rank == self._maker(number, index):
                    self._now[number, index] = self._new(number, index)
        barrier()
        for number in numbers:
            if self._schedule.nodes[self._rank] != self._schedule.home(number):
                continue
            if self._schedule.receivers[number].on_gpu:
                continue
            for index in indices:
                if (number, index) not in self._now:
                    segment = Segment.open(self._name(number, index), write=True)
                    self._now[number, index] = Buffer(_bytes(segment), segment, owned=False)

    def _maker(self, number: int, index: int) -> int:
        """The rank that creates a buffer: the publisher on GPUs; otherwise the node's ranks take turns, sharing the
        kernel's work of clearing pages."""
        if self._schedule.receivers[number].on_gpu:
            return self._schedule.receivers[number].publishers[0]
        home = self._schedule.home(number)
        ranks = [rank for rank, node in enumerate(self._schedule.nodes) if node == home]
        return ranks[index % len(ranks)]

    def _new(self, number: int, index: int) -> Buffer:
        size, receiver = self._schedule.capacity(number, index), self._schedule.receivers[number]
        if receiver.on_gpu:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            handle = cuda_memory.share(memory) if memory.is_cuda and receiver.local else None
            return Buffer(memory, None, owned=True, handle=handle)
        segment = Segment.create(self._name(number, index), size)
        return Buffer(_bytes(segment), segment, owned=True)

    def _name(self, number: int, index: int) -> str:
        return segment_name(self._run, self._schedule.home(number), number, index)


def entry_views(data: Tensor, entry_slice: EntrySlice, block: Block) -> tuple[Tensor, Tensor | None]:
    """A tensor and its scales as views of a buffer (uint8)."""
    entry = entry_slice.entry
    raw = data[entry_slice.offset : entry_slice.offset + entry.bytes]
    tensor = raw.view(torch_type(entry)).view(entry.shape)
    if entry_slice.scale_offset is None:
        return tensor, None
    shape = scale_shape(entry.shape, block)
    scales = data[entry_slice.scale_offset : entry_slice.scale_offset + 4 * math.prod(shape)]
    return tensor, scales.view(torch.float32).view(shape)


def barrier() -> None:
    """Wait for all trainer ranks, if there are several."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _bytes(segment: Segment) -> Tensor:
    return torch.frombuffer(segment.memory, dtype=torch.uint8)
