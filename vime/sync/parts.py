"""Types of the weight sync's schedule: receivers, entries, buckets and moves."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field
from typing import Literal

from vime.fp8.format import scale_shape
from vime.models.namemap import Param
from vime.models.shards import Piece

BUFFERS = 2
"""Buffers of a receiver, and so buckets in flight at once; bucket b uses buffer b mod BUFFERS."""


ALIGNMENT = 64


OPEN_BUCKETS = 8
"""Limit, in buckets, on layers sent interleaved: an engine keeps a layer's tensors until it has all of them."""


_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4}


Target = Literal["policy", "draft"]


RECEIVED = "received."
"""Prefix of checksum names that hold digests of received tensors."""


@dataclass(frozen=True)
class Receiver:
    """A destination of buckets: a node with engine workers, or one worker on a GPU."""

    node: int
    engines: tuple[int, ...]
    experts: frozenset[int] | None
    """Routed experts held by its workers; None: all."""
    publishers: tuple[int, ...]
    """Trainer ranks that take turns publishing its buckets: those on the node, or one rank elsewhere."""
    local: bool
    """True if the publishers are on the node, so its engines find buckets in shared memory."""
    gpu: int | None = None
    """Slot of the GPU that the worker shares with its only publisher; None: a node."""
    on_gpu: bool = False
    """True if buckets are in the only publisher's GPU memory, mapped by the worker there or sent to a far node by a
    group; otherwise they are in shared host memory."""

    def publisher(self, bucket: int) -> int:
        """The rank that publishes this bucket to it."""
        return self.publishers[bucket % len(self.publishers)]

    def needs(self, entry: Entry) -> bool:
        """True if its workers load the tensor."""
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
    """Not trained: copied unchanged from the checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.param.parts[self.part].shape

    @property
    def quantised(self) -> bool:
        return self.dtype == "float8_e4m3fn"

    @property
    def bytes(self) -> int:
        """Size of the tensor without its scales."""
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True)
class EntrySlice:
    """Byte offsets of an entry and its scales in a receiver's buffer."""

    entry: Entry
    offset: int
    scale_offset: int | None


@dataclass(frozen=True)
class Bucket:
    """Tensors sent together."""

    index: int
    target: Target
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Move:
    """Transfer of one box of a tensor from a rank that holds it to a receiver."""

    receiver: int
    """Index into `Schedule.receivers`."""
    entry: Entry
    piece: Piece
    source: int
    """Trainer rank that sends the box."""
    on_shard: bool
    """True if the source quantises it, because its edges are block edges; else the publisher does, from all boxes."""


@dataclass(frozen=True)
class FarGroup:
    """One engine's workers on a node without trainer ranks, and the address of their publisher."""

    receiver: int
    """Index into `Schedule.receivers`."""
    engine: int
    address: str
    """Address of the publisher's node."""
    first_worker: int
    """Index of the first of these workers in the engine."""
    workers: int
    key: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    """Key of the group, new for each."""


def _scale_bytes(entry: Entry, block: tuple[int, int]) -> int:
    return math.prod(scale_shape(entry.shape, block)) * 4


def padded(size: int) -> int:
    """`size` in bytes, rounded up to ALIGNMENT, where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT
