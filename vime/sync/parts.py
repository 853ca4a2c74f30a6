"""Types of the weight sync's schedule: receivers, entries, buckets and moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vime.fp8.format import scale_shape
from vime.models.namemap import Param
from vime.models.shards import Piece

SLOTS = 2
"""Buckets of a receiver that may be under way at once; bucket b uses slot b mod SLOTS."""


ALIGNMENT = 64


OPEN_BUCKETS = 8
"""An engine keeps the tensors of a layer until it has all of them: layers that go by turns are at most that large."""


_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4}


Target = Literal["policy", "draft"]


RECEIVED = "received."
"""Of the names under which an engine's checksums show the digests of what its workers received."""


@dataclass(frozen=True)
class Receiver:
    """A node with engine workers, or one worker on a GPU."""

    node: int
    engines: tuple[int, ...]
    experts: frozenset[int] | None
    """Routed experts that its workers hold; None: all."""
    publishers: tuple[int, ...]
    """Trainer ranks that take turns in giving it a bucket: those on the node, or one rank elsewhere."""
    local: bool
    """Whether the publishers sit on the node, so that its engines find buckets in shared memory."""
    gpu: int | None = None
    """Slot of the GPU that the worker shares with its only publisher; None: a node."""
    on_gpu: bool = False
    """Whether buckets lie in the memory of the only publisher's GPU, from where the worker there maps them or a group
    brings them to a far node; otherwise in shared memory of the host."""

    def publisher(self, bucket: int) -> int:
        """The rank that gives it this bucket."""
        return self.publishers[bucket % len(self.publishers)]

    def needs(self, entry: Entry) -> bool:
        """Whether its workers load the tensor."""
        return entry.param.expert is None or self.experts is None or entry.param.expert in self.experts


@dataclass(frozen=True)
class Entry:
    """One HF tensor of the stream."""

    name: str
    param: Param
    part: int
    """Index into `param.parts`."""
    dtype: str
    """Type in the stream: `float8_e4m3fn` (with fp32 scales), `bfloat16` or `float32`."""
    frozen: bool = False
    """Not trained: it comes from the checkpoint as it is."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.param.parts[self.part].shape

    @property
    def quantised(self) -> bool:
        return self.dtype == "float8_e4m3fn"

    @property
    def bytes(self) -> int:
        """Of the tensor, without its scales."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class EntrySlice:
    """Where an entry lies in a receiver's buffer, in bytes."""

    entry: Entry
    offset: int
    scale_offset: int | None


@dataclass(frozen=True)
class Bucket:
    """What is sent at once."""

    index: int
    target: Target
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Move:
    """One box of a tensor from the rank that holds it to a receiver."""

    receiver: int
    """Index into `Schedule.receivers`."""
    entry: Entry
    piece: Piece
    source: int
    """Rank."""
    on_shard: bool
    """Whether the source quantises it: its edges are edges of blocks. Otherwise the publisher does, from all boxes."""


@dataclass(frozen=True)
class FarGroup:
    """The workers of one engine on a node without trainer ranks, and the publisher that sends to them."""

    receiver: int
    """Index into `Schedule.receivers`."""
    engine: int
    address: str
    """Of the publisher's node."""
    first_worker: int
    """Number of the first of these workers in the engine."""
    workers: int


def _scale_bytes(entry: Entry, block: tuple[int, int]) -> int:
    return math.prod(scale_shape(entry.shape, block)) * 4


def padded(size: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT
