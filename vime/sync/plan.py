"""The schedule of a weight sync: which tensors in which bucket, from which rank to which node. Pure, without torch.

Every rank and the driver compute the same schedule from the same plan, so no two can wait for each other in a different
order. A *receiver* is a node with engine workers, or with GPUs that trainer and engines share a single worker; it gets
what its workers need: every dense tensor, and of the routed experts only its workers' own where the engine is expert
parallel. A *bucket* is a run of tensors that fits `--update-weight-buffer-size` at every receiver. Their order is the
model's, but layers of different pipeline stages and experts of different ranks go by turns, so that all ranks have
something to quantise and to send at any time.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vime.checkpoint.fp8_format import is_quantised, scale_shape
from vime.errors import BadInput
from vime.models.config import ModelConfig, Quantisation
from vime.models.families import params_of
from vime.models.namemap import Param, Where
from vime.models.shards import Piece, holds, pieces
from vime.planning.types import EnginePlan, Plan
from vime.recipe.parallel import Coordinates, ParallelLayout

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
class Place:
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


@dataclass(frozen=True)
class Schedule:
    """All buckets of a sync, and what each rank sends and receives for them."""

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
        """The node on which a receiver's buffer lies: its own, or the publisher's if it is far."""
        return self.nodes[self.receivers[receiver].publishers[0]]

    def places(self, bucket: int, receiver: int) -> tuple[tuple[Place, ...], int]:
        """Layout of a receiver's buffer for a bucket, and its bytes."""
        key = (bucket, receiver)
        if key not in self._places:
            self._places[key] = _places(self.buckets[bucket].entries, self.receivers[receiver], self.block)
        return self._places[key]

    @functools.cached_property
    def _places(self) -> dict[tuple[int, int], tuple[tuple[Place, ...], int]]:
        """What `places` has answered."""
        return {}

    def capacity(self, receiver: int, slot: int) -> int:
        """Bytes of the largest bucket at a receiver among those that use one of the SLOTS slots."""
        return max((self.places(bucket.index, receiver)[1] for bucket in self.buckets[slot::SLOTS]), default=0)

    def moves(self, bucket: int) -> Iterator[Move]:
        """Every move of a bucket, in the order that both ends follow; frozen tensors do not move."""
        for number, receiver in enumerate(self.receivers):
            for entry in self.buckets[bucket].entries:
                if entry.frozen or not receiver.needs(entry):
                    continue
                boxes = self._boxes(entry)
                on_shard = not entry.quantised or all(aligned(box, entry.shape, self.block) for _, box in boxes)
                for shard, box in boxes:
                    yield Move(number, entry, box, self._source(entry.param, shard, number), on_shard)

    def holders(self, param: Param) -> list[int]:
        """The first rank that holds each of a parameter's shards, in their order."""
        shards = 1 if param.tp_dim is None else self.layout.etp if param.expert is not None else self.layout.tp
        return [_holders(self.config, self.layout, _kind(param), shard)[0] for shard in range(shards)]

    def _boxes(self, entry: Entry) -> list[tuple[int, Piece]]:
        """(shard, box) of an entry; boxes of one shard that touch are one."""
        param = entry.param
        shards = 1 if param.tp_dim is None else self.layout.etp if param.expert is not None else self.layout.tp
        found: list[tuple[int, Piece]] = []
        for shard in range(shards):
            mine = [piece for piece in pieces(param, shard, shards) if piece.part == entry.part]
            found += [(shard, piece) for piece in _merged(mine)]
        return found

    def _source(self, param: Param, shard: int, receiver: int) -> int:
        """A rank that has the shard: on the node of the buffer if there is one; equal ones take turns."""
        ranks = _holders(self.config, self.layout, _kind(param), shard)
        near = [rank for rank in ranks if self.nodes[rank] == self.home(receiver)]
        if self.receivers[receiver].on_gpu:
            near = [rank for rank in near if rank in self.receivers[receiver].publishers] or near
        turn = (param.expert or 0) + (param.layer or 0) + (0 if near else receiver)
        ranks = near or list(ranks)
        return ranks[turn % len(ranks)]


def schedule_of(plan: Plan) -> Schedule:
    """The schedule of a run. Raises BadInput for engines on a trainer's node that do not share its ranks' GPUs."""
    config = ModelConfig.from_hf(plan.model_config_hf)
    nodes = tuple(rank.node for rank in plan.trainer_ranks)
    options = plan.recipe.engine.vllm
    real = plan.cluster.gpu_request != "none" and plan.cluster.gpus_per_node > 0
    shared = [rank.gpu for rank in plan.trainer_ranks] if real else None
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
    """Whether the engines speculate with the model's own MTP layers, so hold them as a draft model."""
    speculative: Mapping[str, Any] = plan.recipe.engine.vllm.get("speculative_config") or {}
    return "mtp" in str(speculative.get("method", ""))


def far_groups(schedule: Schedule, engine: EnginePlan, addresses: Sequence[str]) -> list[FarGroup]:
    """The groups through which an engine's far nodes are reached; `addresses` are those of the logical nodes."""
    groups, first = [], 0
    for node, gpus in zip(engine.nodes, engine.gpus, strict=True):
        number = next(i for i, receiver in enumerate(schedule.receivers) if receiver.node == node)
        receiver = schedule.receivers[number]
        if not receiver.local:
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
    """Fill buckets of at most `buffer_bytes`; the draft's tensors have buckets of their own.

    vLLM loads whole tensors, so one that is larger than the buffer (a large vocabulary's) is a bucket alone.
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


def receivers_of(
    config: ModelConfig,
    nodes: Sequence[int],
    engines: Sequence[EnginePlan],
    *,
    experts_anywhere: bool = False,
    gpus: Sequence[int] | None = None,
) -> tuple[Receiver, ...]:
    """Nodes with engine workers; with `gpus`, the GPU slot of every trainer rank, one receiver a worker that shares
    its GPU with a rank.

    `experts_anywhere`: vLLM places experts by load, so every worker gets all.
    """
    wanted: dict[tuple[int, int | None], list[tuple[int, frozenset[int] | None]]] = {}
    shared = frozenset(nodes) if gpus is not None else frozenset()
    for engine in engines:
        size = engine.tensor_parallel_size * engine.data_parallel_size
        split = engine.expert_parallel and config.moe is not None and not experts_anywhere
        for place, workers in _workers(engine, shared):
            experts = experts_of(workers, size, config.moe.num_experts) if split and config.moe else None
            wanted.setdefault(place, []).append((engine.index, experts))
    found = []
    for turn, ((node, gpu), parts) in enumerate(sorted(wanted.items(), key=lambda item: (item[0][0], item[0][1] or 0))):
        near = tuple(rank for rank, place in enumerate(nodes) if place == node and (gpus is None or gpus[rank] == gpu))
        if gpu is not None and not near:
            raise BadInput(
                f"GPU {gpu} of node {node} has a worker of engine {parts[0][0]} and no trainer rank, but the node has "
                "some: give engines GPUs that they share with the trainer (--colocate), or nodes of their own"
            )
        sets = [experts for _, experts in parts]
        union = None if None in sets else frozenset().union(*(experts for experts in sets if experts is not None))
        # A far node's publishers should differ, so that one rank does not send to all of them.
        far = (turn * len(nodes) // max(1, len(wanted)),)
        publishers = (near if gpus is None else near[:1]) or far
        index = tuple(index for index, _ in parts)
        found.append(Receiver(node, index, union, publishers, bool(near), gpu, on_gpu=gpus is not None))
    return tuple(found)


def _workers(engine: EnginePlan, shared: Collection[int]) -> Iterator[tuple[tuple[int, int | None], range]]:
    """Places of an engine's workers, (node, GPU slot) on `shared` nodes or (node, None), and the numbers of those
    there."""
    first = 0
    for node, slots in zip(engine.nodes, engine.gpus, strict=True):
        if node in shared:
            for number, slot in enumerate(slots, first):
                yield (node, slot), range(number, number + 1)
        else:
            yield (node, None), range(first, first + len(slots))
        first += len(slots)


def experts_of(workers: range, size: int, experts: int) -> frozenset[int]:
    """Experts of some of an engine's `size` expert-parallel workers: in order, the first get more, as vLLM has it."""
    base, more = divmod(experts, size)
    first, last = (worker * base + min(worker, more) for worker in (workers.start, workers.stop))
    return frozenset(range(first, last))


def aligned(box: Piece, shape: Sequence[int], block: tuple[int, int]) -> bool:
    """Whether a box of a matrix is made of whole blocks."""
    return all(
        start % size == 0 and ((start + length) % size == 0 or start + length == whole)
        for start, length, whole, size in zip(box.start, box.size, shape, block, strict=True)
    )


def _policy(
    config: ModelConfig, expert_turns: Mapping[int, int], layer_turns: Sequence[tuple[int, int]]
) -> Iterator[Entry]:
    """What the policy's model in the engine loads: all but MTP layers, in turns from the embedding to the head.

    Layers of one turn are mixed: what is not an expert of each, then the first expert of each, and so on.
    """
    place = {Where.EMBEDDING: 0, Where.DECODER: 1, Where.HEAD: 2}
    seen: Counter[tuple[Where, int | None, int | None]] = Counter()
    ordered: list[tuple[tuple[int, tuple[int, int], int, int, int], Param]] = []
    for param in params_of(config):
        if param.where in place:
            expert = -1 if param.expert is None else expert_turns[param.expert]
            turn = (0, 0) if param.layer is None else layer_turns[param.layer]
            owner = (param.where, param.layer, param.expert)
            ordered.append(((place[param.where], turn, expert, param.layer or 0, seen[owner]), param))
            seen[owner] += 1
    for _, param in sorted(ordered, key=operator.itemgetter(0)):
        for part in range(len(param.parts)):
            yield _entry(config, param, part, param.parts[part].name)


def _layer_turns(
    config: ModelConfig, layout: ParallelLayout, receivers: Sequence[Receiver], limit: int
) -> list[tuple[int, int]]:
    """By decoder layer: its turn. Each stage's first layer, each stage's second, …, in as many groups of stages as the
    engines' memory asks for."""
    stages = layout.stage_layers(config.num_layers)
    sizes = [0] * len(receivers)
    for param in params_of(config):
        if param.where == Where.DECODER and param.layer == config.num_layers - 1:
            for part in range(len(param.parts)):
                entry = _entry(config, param, part, param.parts[part].name)
                for number, receiver in enumerate(receivers):
                    sizes[number] += entry.bytes * receiver.needs(entry)
    together = max(1, OPEN_BUCKETS * limit // max(1, *sizes))
    turns = [(0, 0)] * config.num_layers
    for stage, layers in enumerate(stages):
        for number, layer in enumerate(layers):
            turns[layer] = (number, stage // together)
    return turns


def _expert_turns(config: ModelConfig, layout: ParallelLayout, receivers: Sequence[Receiver]) -> dict[int, int]:
    """By expert: its place among those that go from the same source to the same receiver."""
    experts = config.moe.num_experts if config.moe is not None else 0
    first: dict[int, int] = {}
    for number, receiver in enumerate(receivers):
        for expert in range(experts) if receiver.experts is None else receiver.experts:
            first.setdefault(expert, number)
    turns: dict[int, int] = {}
    taken: Counter[tuple[int, int | None]] = Counter()
    for expert in range(experts):
        way = (expert // (experts // layout.ep), first.get(expert))
        turns[expert] = taken[way]
        taken[way] += 1
    return turns


def _draft(config: ModelConfig, trained: bool) -> Iterator[Entry]:
    """What the MTP draft loads: its layers, and the shared embedding and head under the names that they have there."""
    for param in params_of(config):
        for part, tensor in enumerate(param.parts):
            if param.where == Where.MTP:
                yield _entry(config, param, part, tensor.name, frozen=not trained)
            elif param.where in (Where.EMBEDDING, Where.HEAD):
                for alias in tensor.aliases:
                    yield _entry(config, param, part, alias)


def _entry(config: ModelConfig, param: Param, part: int, name: str, frozen: bool = False) -> Entry:
    quantised = is_quantised(name, param.parts[part].quantised, config.quantisation)
    return Entry(name, param, part, "float8_e4m3fn" if quantised else "float32" if param.fp32 else "bfloat16", frozen)


def _fill(
    entries: Iterator[Entry], receivers: Sequence[Receiver], limit: int, quantisation: Quantisation | None
) -> Iterator[list[Entry]]:
    block = quantisation.block if quantisation else (128, 128)
    group: list[Entry] = []
    filled = [0] * len(receivers)
    for entry in entries:
        size = padded(entry.bytes) + (padded(_scale_bytes(entry, block)) if entry.quantised else 0)
        after = [used + size * receiver.needs(entry) for used, receiver in zip(filled, receivers, strict=True)]
        if group and max(after, default=0) > limit:
            yield group
            group, after = [], [size * receiver.needs(entry) for receiver in receivers]
        group.append(entry)
        filled = after
    if group:
        yield group


def _places(entries: tuple[Entry, ...], receiver: Receiver, block: tuple[int, int]) -> tuple[tuple[Place, ...], int]:
    places, offset = [], 0
    for entry in entries:
        if not receiver.needs(entry):
            continue
        start, scale = offset, None
        offset += padded(entry.bytes)
        if entry.quantised:
            scale = offset
            offset += padded(_scale_bytes(entry, block))
        places.append(Place(entry, start, scale))
    return tuple(places), offset


def _scale_bytes(entry: Entry, block: tuple[int, int]) -> int:
    return math.prod(scale_shape(entry.shape, block)) * 4


def padded(size: int) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _merged(boxes: list[Piece]) -> Iterator[Piece]:
    """Boxes of rows that follow each other in the HF tensor and in the shard, as one."""
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
    """A parameter with the same holders, the same object for all of a layer's and an expert's."""
    return _kind_of(param.where, param.layer, param.expert, param.tp_dim is None)


@functools.lru_cache(maxsize=65536)
def _kind_of(where: Where, layer: int | None, expert: int | None, replicated: bool) -> Param:
    return Param("", (), (), where=where, layer=layer, expert=expert, tp_dim=None if replicated else 0)


@functools.lru_cache(maxsize=65536)
def _holders(config: ModelConfig, layout: ParallelLayout, kind: Param, shard: int) -> tuple[int, ...]:
    """Ranks that hold a shard of the parameter; of a tied embedding those of the first stage."""
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
