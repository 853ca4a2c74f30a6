"""The schedule of a weight sync: tensors of each bucket, source and receiver of each box. Pure, without torch.

Every rank and the driver compute the same schedule from the same plan, so no two wait for each other in different
orders. A *receiver* is a node with engine workers, or a single worker if trainer and engines share GPUs. It gets what
its workers need: every dense tensor, and all routed experts, or only its workers' own if the engine is expert
parallel. A *bucket* is a run of tensors that fits `--update-weight-buffer-size` at every receiver. Tensors follow the
model's order, except that layers of different pipeline stages and experts of different ranks alternate, so that all
ranks always have something to quantise and send.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.namemap import Param, Where
from vime.models.shards import Piece, holds, pieces
from vime.recipe.parallel import Coordinates, ParallelLayout
from vime.run.plan import EnginePlan, Plan
from vime.sync.order import _draft, _expert_turns, _fill, _layer_turns, _policy
from vime.sync.parts import (
    BUFFERS,
    Bucket,
    Entry,
    EntrySlice,
    FarGroup,
    Move,
    Receiver,
    Target,
    _scale_bytes,
    padded,
)
from vime.sync.receivers import receivers_of


@dataclass(frozen=True)
class Schedule:
    """All buckets of a sync, and the moves that fill them."""

    config: ModelConfig
    layout: ParallelLayout
    nodes: tuple[int, ...]
    """Node of every trainer rank."""
    receivers: tuple[Receiver, ...]
    buckets: tuple[Bucket, ...]

    @property
    def block(self) -> tuple[int, int]:
        """Block size of quantised entries."""
        return self.config.quantisation.block if self.config.quantisation else (128, 128)

    def home(self, receiver: int) -> int:
        """The node that holds a receiver's buffer: its own, or its publisher's if it is far."""
        return self.nodes[self.receivers[receiver].publishers[0]]

    def slices(self, bucket: int, receiver: int) -> tuple[tuple[EntrySlice, ...], int]:
        """Layout of a receiver's buffer for a bucket, and its size in bytes."""
        key = (bucket, receiver)
        if key not in self._slices:
            self._slices[key] = _slices(self.buckets[bucket].entries, self.receivers[receiver], self.block)
        return self._slices[key]

    @functools.cached_property
    def _slices(self) -> dict[tuple[int, int], tuple[tuple[EntrySlice, ...], int]]:
        """Cache of `slices`."""
        return {}

    def capacity(self, receiver: int, buffer: int) -> int:
        """Bytes of the largest bucket at a receiver among those that use one of its buffers."""
        return max((self.slices(bucket.index, receiver)[1] for bucket in self.buckets[buffer::BUFFERS]), default=0)

    def moves(self, bucket: int) -> Iterator[Move]:
        """Every move of a bucket, in the order used by both sender and receiver; frozen tensors have none."""
        for number, receiver in enumerate(self.receivers):
            for entry in self.buckets[bucket].entries:
                if entry.frozen or not receiver.needs(entry):
                    continue
                boxes = self._boxes(entry)
                on_shard = not entry.quantised or all(aligned(box, entry.shape, self.block) for _, box in boxes)
                for shard, box in boxes:
                    yield Move(number, entry, box, self._source(entry.param, shard, number), on_shard)

    def holders(self, param: Param) -> list[int]:
        """For each of a parameter's shards, in order, the first rank that holds it."""
        shards = 1 if param.tp_dim is None else self.layout.etp if param.expert is not None else self.layout.tp
        return [_holders(self.config, self.layout, _kind(param), shard)[0] for shard in range(shards)]

    def _boxes(self, entry: Entry) -> list[tuple[int, Piece]]:
        """(shard, box) pairs of an entry; adjacent boxes of one shard are merged."""
        param = entry.param
        shards = 1 if param.tp_dim is None else self.layout.etp if param.expert is not None else self.layout.tp
        found: list[tuple[int, Piece]] = []
        for shard in range(shards):
            mine = [piece for piece in pieces(param, shard, shards) if piece.part == entry.part]
            found += [(shard, piece) for piece in _merged(mine)]
        return found

    def _source(self, param: Param, shard: int, receiver: int) -> int:
        """A rank that holds the shard, on the buffer's node (or GPU) if possible; equally near ranks take turns."""
        ranks = _holders(self.config, self.layout, _kind(param), shard)
        near = [rank for rank in ranks if self.nodes[rank] == self.home(receiver)]
        if self.receivers[receiver].on_gpu:
            near = [rank for rank in near if rank in self.receivers[receiver].publishers] or near
        turn = (param.expert or 0) + (param.layer or 0) + (0 if near else receiver)
        ranks = near or list(ranks)
        return ranks[turn % len(ranks)]


def schedule_of(plan: Plan) -> Schedule:
    """The schedule of a run. Raises BadInput for an engine with both shared GPUs and GPUs of its own on a node."""
    config = plan.model
    nodes = tuple(rank.node for rank in plan.trainer_ranks)
    options = plan.recipe.engine.vllm
    shared = [rank.gpu for rank in plan.trainer_ranks] if plan.on_gpu else None
    spread = bool(options.get("enable_eplb")) or options.get("expert_placement_strategy", "linear") != "linear"
    return make_schedule(
        config,
        plan.layout,
        nodes,
        receivers_of(config, nodes, plan.engines, experts_anywhere=spread, gpus=shared),
        plan.recipe.engine.update_weight_buffer_size,
        draft=has_draft(plan),
        mtp_trained=plan.recipe.model.mtp_num_layers > 0,
    )


def has_draft(plan: Plan) -> bool:
    """True if the engines speculate with the model's MTP layers, and so hold them as a draft model."""
    speculative: Mapping[str, Any] = plan.recipe.engine.vllm.get("speculative_config") or {}
    return "mtp" in str(speculative.get("method", ""))


def far_groups(schedule: Schedule, engine: EnginePlan, addresses: Sequence[str]) -> list[FarGroup]:
    """Process groups that reach an engine's far nodes; `addresses` is indexed by logical node."""
    groups, first = [], 0
    for node, gpus in zip(engine.nodes, engine.gpus, strict=True):
        here = (i for i, receiver in enumerate(schedule.receivers) if receiver.node == node and not receiver.local)
        # Workers that share a rank's GPU, or find buckets in the node's memory, need no group.
        number = next((i for i in here if engine.index in schedule.receivers[i].engines), None)
        if number is not None:
            receiver = schedule.receivers[number]
            address = addresses[schedule.nodes[receiver.publishers[0]]]
            groups.append(FarGroup(number, engine.index, address, first, len(gpus)))
        first += len(gpus)
    return groups


def make_schedule(
    config: ModelConfig,
    layout: ParallelLayout,
    nodes: Sequence[int],
    receivers: Sequence[Receiver],
    buffer_bytes: int,
    *,
    draft: bool = False,
    mtp_trained: bool = False,
) -> Schedule:
    """Fill buckets of at most `buffer_bytes`; the draft model's tensors get separate buckets.

    vLLM loads whole tensors, so one larger than the buffer (a large vocabulary's) gets a bucket to itself. Raises
    BadInput for `buffer_bytes` below 1.
    """
    if buffer_bytes < 1:
        raise BadInput(f"--update-weight-buffer-size {buffer_bytes}: give a number of bytes")
    buckets: list[Bucket] = []
    targets: tuple[Target, ...] = ("policy", "draft") if draft else ("policy",)
    for target in targets:
        if target == "draft":
            entries = _draft(config, mtp_trained)
        else:
            entries = _policy(
                config, _expert_turns(config, layout, receivers), _layer_turns(config, layout, receivers, buffer_bytes)
            )
        for group in _fill(entries, receivers, buffer_bytes, config.quantisation):
            buckets.append(Bucket(len(buckets), target, tuple(group)))
    return Schedule(config, layout, tuple(nodes), tuple(receivers), tuple(buckets))


def aligned(box: Piece, shape: Sequence[int], block: tuple[int, int]) -> bool:
    """True if a box of a matrix consists of whole blocks."""
    return all(
        start % size == 0 and ((start + length) % size == 0 or start + length == whole)
        for start, length, whole, size in zip(box.start, box.size, shape, block, strict=True)
    )


def _slices(
    entries: tuple[Entry, ...], receiver: Receiver, block: tuple[int, int]
) -> tuple[tuple[EntrySlice, ...], int]:
    slices, offset = [], 0
    for entry in entries:
        if not receiver.needs(entry):
            continue
        start, scale = offset, None
        offset += padded(entry.bytes)
        if entry.quantised:
            scale = offset
            offset += padded(_scale_bytes(entry, block))
        slices.append(EntrySlice(entry, start, scale))
    return tuple(slices), offset


def _merged(boxes: list[Piece]) -> Iterator[Piece]:
    """Merge boxes whose rows are consecutive both in the HF tensor and in the shard."""
    current: Piece | None = None
    for box in boxes:
        if (
            current is not None
            and current.start[0] + current.size[0] == box.start[0]
            and current.at[0] + current.size[0] == box.at[0]
            and (current.start[1:], current.size[1:], current.at[1:]) == (box.start[1:], box.size[1:], box.at[1:])
        ):
            size = (current.size[0] + box.size[0], *current.size[1:])
            current = Piece(current.part, current.start, size, current.at)
            continue
        if current is not None:
            yield current
        current = box
    if current is not None:
        yield current


def _kind(param: Param) -> Param:
    """Stand-in parameter with the same holders, shared by all of a layer or an expert: a small key for `_holders`."""
    return _kind_of(param.where, param.layer, param.expert, param.tp_dim is None)


@functools.lru_cache(maxsize=65536)
def _kind_of(where: Where, layer: int | None, expert: int | None, replicated: bool) -> Param:
    return Param("", (), (), where=where, layer=layer, expert=expert, tp_dim=None if replicated else 0)


@functools.lru_cache(maxsize=65536)
def _holders(config: ModelConfig, layout: ParallelLayout, kind: Param, shard: int) -> tuple[int, ...]:
    """Ranks that hold a shard of the parameter; for a tied embedding only those of the first stage."""
    found = []
    for rank in range(layout.world_size):
        at = _coordinates(layout, rank)
        own = at.etp if kind.expert is not None else at.tp
        if kind.where == Where.EMBEDDING and at.pp != 0:
            continue
        if (kind.tp_dim is None or own == shard) and holds(kind, config, layout, at):
            found.append(rank)
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def _coordinates(layout: ParallelLayout, rank: int) -> Coordinates:
    return layout.coordinates(rank)
