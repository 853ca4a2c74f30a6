"""Where buckets lie: a receiver's two buffers, in shared memory of a trainer's node or in the memory of a GPU, and the
tensors in them."""

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
from vime.sync.parts import SLOTS, EntrySlice
from vime.sync.schedule import Schedule
from vime.sync.segment import Segment, segment_name
from vime.sync.wire import Block, torch_type

Views = dict[int, dict[str, tuple[Tensor, Tensor | None]]]
"""By receiver and HF name: the tensor in the receiver's buffer, and its scales."""


@dataclass
class Buffer:
    """A bucket's place for one receiver."""

    data: Tensor
    """uint8 [capacity]."""
    segment: Segment | None
    """The shared memory that it is; None on a GPU."""
    owned: bool
    """Whether there is a name that this rank has to remove."""
    handle: list[Any] | None = None
    """What another process needs to map it, on a GPU."""

    def unlink(self) -> None:
        """Nobody finds the memory by its name any more."""
        if self.segment is not None and self.owned:
            self.segment.unlink()
            self.owned = False


class Buffers:
    """The buffers that one rank reaches: those on its node, or on its GPU.

    All ranks call `prepare` at the same time. Buffers of far receivers in the memory of the host stay from one sync to
    the next: nobody needs their names once the node's ranks have mapped them, and pages cost more to make than to fill.
    """

    def __init__(self, schedule: Schedule, rank: int, run: str, device: torch.device) -> None:
        self._schedule, self._rank, self._run, self._device = schedule, rank, run, device
        self._now: dict[tuple[int, int], Buffer] = {}
        """By receiver and slot."""
        self._kept: dict[tuple[int, int], Buffer] = {}
        self._makings, self._kept_since = 0, 0
        """How often buffers to be kept were made, and the time that `_kept` is of; 0: there are none."""

    def prepare(self) -> None:
        """Have all buffers of a sync."""
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
        """The buffer of a bucket."""
        return self._now[receiver, bucket % SLOTS]

    def views(self, bucket: int, receiver: int) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By HF name: the tensor and its scales in the receiver's buffer."""
        places, _ = self._schedule.places(bucket, receiver)
        data = self.of(bucket, receiver).data
        return {place.entry.name: entry_views(data, place, self._schedule.block) for place in places}

    def finish(self) -> None:
        """Give all memory back but what stays."""
        for buffer in self._now.values():
            buffer.unlink()
        self._now.clear()

    def forget(self) -> None:
        """Let what stays go too: somebody may still read it."""
        self._kept, self._kept_since = {}, 0

    def _stays(self, number: int) -> bool:
        receiver = self._schedule.receivers[number]
        return not receiver.local and not receiver.on_gpu

    def _all_kept(self) -> bool:
        """Whether every rank still has what was made at the same time; one that saw a sync fail has not."""
        times = torch.tensor([self._kept_since, -self._kept_since], device=self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(times, dist.ReduceOp.MIN)
        first, last = times.tolist()
        return first == -last > 0

    def _make(self, numbers: Collection[int]) -> None:
        """Make the buffers of some receivers and map those that other ranks of the node have made."""
        slots = range(min(SLOTS, len(self._schedule.buckets)))
        for number in numbers:
            for slot in slots:
                if self._rank == self._maker(number, slot):
                    self._now[number, slot] = self._new(number, slot)
        barrier()
        for number in numbers:
            if self._schedule.nodes[self._rank] != self._schedule.home(number):
                continue
            if self._schedule.receivers[number].on_gpu:
                continue
            for slot in slots:
                if (number, slot) not in self._now:
                    segment = Segment.open(self._name(number, slot), write=True)
                    self._now[number, slot] = Buffer(_bytes(segment), segment, owned=False)

    def _maker(self, number: int, slot: int) -> int:
        """The rank that makes a buffer: the publisher on GPUs; else the node's ranks share the work, most of which is
        the kernel's, clearing pages."""
        if self._schedule.receivers[number].on_gpu:
            return self._schedule.receivers[number].publishers[0]
        home = self._schedule.home(number)
        ranks = [rank for rank, node in enumerate(self._schedule.nodes) if node == home]
        return ranks[slot % len(ranks)]

    def _new(self, number: int, slot: int) -> Buffer:
        size, receiver = self._schedule.capacity(number, slot), self._schedule.receivers[number]
        if receiver.on_gpu:
            memory = torch.empty(size, dtype=torch.uint8, device=self._device)
            handle = cuda_memory.share(memory) if memory.is_cuda and receiver.local else None
            return Buffer(memory, None, owned=True, handle=handle)
        segment = Segment.create(self._name(number, slot), size)
        return Buffer(_bytes(segment), segment, owned=True)

    def _name(self, number: int, slot: int) -> str:
        return segment_name(self._run, self._schedule.home(number), number, slot)


def entry_views(data: Tensor, place: EntrySlice, block: Block) -> tuple[Tensor, Tensor | None]:
    """A tensor and its scales as views of a buffer (uint8)."""
    entry = place.entry
    raw = data[place.offset : place.offset + entry.bytes]
    tensor = raw.view(torch_type(entry)).view(entry.shape)
    if place.scale_offset is None:
        return tensor, None
    shape = scale_shape(entry.shape, block)
    scales = data[place.scale_offset : place.scale_offset + 4 * math.prod(shape)]
    return tensor, scales.view(torch.float32).view(shape)


def barrier() -> None:
    """Wait for all trainer ranks, where there are several."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def _bytes(segment: Segment) -> Tensor:
    return torch.frombuffer(segment.memory, dtype=torch.uint8)
