"""The schedule: every receiver gets every box of what it needs once, from a rank that has it, in small buckets."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support import patience
from tests.support.hf_configs import DEEPSEEK_R1
from tests.support.plans import engine_plan
from tests.support.tiny_hf import DEEPSEEK, QWEN3, QWEN3_MOE, with_fp8
from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Param, Where
from vime.models.shards import check_layout, holds, pieces, tensor_split
from vime.recipe.parallel import ParallelLayout
from vime.sync.parts import BUFFERS
from vime.sync.receivers import experts_of, receivers_of
from vime.sync.schedule import Schedule, aligned, far_groups, make_schedule

ORDER = [Where.EMBEDDING, Where.DECODER, Where.HEAD]
CONFIGS = [with_fp8(DEEPSEEK), with_fp8(DEEPSEEK, (24, 40)), DEEPSEEK, QWEN3, QWEN3_MOE]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any model, layout, spread of ranks over nodes and set of engines."""
    config = ModelConfig.from_hf(draw(st.sampled_from(CONFIGS)))
    tp, pp, ep, etp, more = (draw(st.sampled_from([1, 2])) for _ in range(5))
    last = draw(st.sampled_from([None, 1])) if pp > 1 else None
    if config.moe is None:
        ep = etp = 1
    world = math.lcm(tp * pp, ep * etp * pp) * more
    layout = ParallelLayout(world, tp=tp, pp=pp, ep=ep, etp=etp, last_stage_layers=last)
    try:
        check_layout(config, layout)
    except BadInput:
        assume(False)
    per_node = draw(st.sampled_from([1, 2, 4, 8]))
    nodes = [rank // per_node for rank in range(world)]
    gpus = None
    if draw(st.booleans()):
        # Engines on the trainer's own GPUs: all of them, or two that share them.
        gpus = [rank % per_node for rank in range(world)]
        places = {node: tuple(range(nodes.count(node))) for node in sorted(set(nodes))}
        engines = [engine_plan(0, places, data=world, expert_parallel=draw(st.booleans()))]
        if draw(st.booleans()):
            engines = [engine_plan(i, {node: (gpu,)}) for i, (node, gpu) in enumerate(zip(nodes, gpus, strict=True))]
        if draw(st.booleans()):
            # Engines on GPUs of their own, beside the others or alone.
            apart = engine_plan(
                0, {nodes[-1] + 1: (0, 1), nodes[-1] + 2: (0, 1)}, data=4, expert_parallel=draw(st.booleans())
            )
            engines = [*engines, apart.model_copy(update={"index": len(engines)})] if draw(st.booleans()) else [apart]
    elif draw(st.booleans()):
        engines = [engine_plan(0, {0: (0, 1), 1: (0, 1)}, tensor=2, data=2, expert_parallel=draw(st.booleans()))]
        engines.append(engine_plan(1, {1: (2,), 2: (0,)}, data=2, expert_parallel=True))
    else:
        engines = [engine_plan(i, {node: (0,)}) for i, node in enumerate(draw(st.sets(st.integers(0, 3), min_size=1)))]
    limit = draw(st.sampled_from([20_000, 50_000, 10**9]))
    options = {"draft": draw(st.booleans()), "mtp_trained": draw(st.booleans())}
    return make_schedule(config, layout, nodes, receivers_of(config, nodes, engines, gpus=gpus), limit, **options)


@settings(max_examples=80, deadline=None)
@given(schedules())
def test_every_receiver_gets_every_box_once_from_a_rank_that_has_it(schedule: Schedule) -> None:
    config, layout = schedule.config, schedule.layout
    for bucket in schedule.buckets:
        got: dict[tuple[int, str], int] = {}
        for move in schedule.moves(bucket.index):
            coords = layout.coordinates(move.source)
            param = move.entry.param
            assert holds(param, config, layout, coords)
            mine = [piece for piece in pieces(param, *tensor_split(param, layout, coords)) if inside(piece, move.piece)]
            assert sum(math.prod(piece.size) for piece in mine) == math.prod(move.piece.size)
            key = (move.receiver, move.entry.name)
            got[key] = got.get(key, 0) + math.prod(move.piece.size)
            if move.on_shard and move.entry.quantised:
                assert aligned(move.piece, move.entry.shape, schedule.block)
        wanted = {
            (number, entry.name): math.prod(entry.shape)
            for number, receiver in enumerate(schedule.receivers)
            for entry in bucket.entries
            if receiver.needs(entry) and not entry.frozen
        }
        assert got == wanted


def test_a_worker_on_a_gpu_gets_its_own_experts_from_the_rank_there_where_it_has_them() -> None:
    config, layout = ModelConfig.from_hf(with_fp8(DEEPSEEK)), ParallelLayout(4, ep=4)
    shared = engine_plan(0, {0: (0, 1), 1: (0, 1)}, data=4, expert_parallel=True)
    receivers = receivers_of(config, [0, 0, 1, 1], [shared], gpus=[0, 1, 0, 1])
    assert [(receiver.node, receiver.gpu, receiver.publishers) for receiver in receivers] == [
        (0, 0, (0,)), (0, 1, (1,)), (1, 0, (2,)), (1, 1, (3,)),
    ]  # fmt: skip
    schedule = make_schedule(config, layout, [0, 0, 1, 1], receivers, 1 << 30)
    for bucket in schedule.buckets:
        for move in schedule.moves(bucket.index):
            # The trainer's experts lie as the engine's do, and everything else is on every rank: nothing has to travel.
            assert move.source == schedule.receivers[move.receiver].publishers[0]


def test_engines_on_gpus_of_their_own_get_buckets_out_of_a_ranks_gpu_through_a_group_a_node() -> None:
    config = ModelConfig.from_hf(with_fp8(DEEPSEEK))
    apart = engine_plan(0, {1: (0, 1), 2: (0, 1)}, data=4, expert_parallel=True)
    receivers = receivers_of(config, [0, 0], [apart], gpus=[0, 1])
    assert [(one.node, one.gpu, one.publishers, one.local, one.on_gpu) for one in receivers] == [
        (1, None, (0,), False, True), (2, None, (1,), False, True),
    ]  # fmt: skip
    assert [len(one.experts or ()) for one in receivers] == [config.moe.num_experts // 2] * 2  # type: ignore[union-attr]
    schedule = make_schedule(config, ParallelLayout(2, ep=2), [0, 0], receivers, 1 << 30)
    groups = far_groups(schedule, apart, ["10.0.0.1", "10.0.0.2", "10.0.0.3"])
    assert [(group.address, group.first_worker, group.workers) for group in groups] == [
        ("10.0.0.1", 0, 2), ("10.0.0.1", 2, 2),
    ]  # fmt: skip


def test_engines_beside_the_trainer_on_its_node_receive_over_a_group_from_a_rank_there() -> None:
    config = ModelConfig.from_hf(with_fp8(DEEPSEEK))
    beside = [engine_plan(0, {0: (2,)}), engine_plan(1, {0: (3,)})]
    receivers = receivers_of(config, [0, 0], beside, gpus=[0, 1])
    assert [(one.node, one.gpu, one.engines, one.publishers, one.local, one.on_gpu) for one in receivers] == [
        (0, None, (0, 1), (0,), False, True),
    ]  # fmt: skip
    schedule = make_schedule(config, ParallelLayout(2, ep=2), [0, 0], receivers, 1 << 30)
    for engine in beside:
        (group,) = far_groups(schedule, engine, ["10.0.0.1"])
        assert (group.receiver, group.engine, group.first_worker, group.workers) == (0, engine.index, 0, 1)


def test_an_engine_with_shared_gpus_and_gpus_of_its_own_on_a_node_is_refused() -> None:
    config = ModelConfig.from_hf(with_fp8(DEEPSEEK))
    with pytest.raises(BadInput, match="engine 0 has workers on GPUs of node 0 that trainer ranks use and on GPU 1"):
        receivers_of(config, [0], [engine_plan(0, {0: (0, 1)}, tensor=2)], gpus=[0])


def inside(piece, box) -> bool:
    """Whether a piece of a shard lies in a move's box, at the same place of tensor and shard."""
    return piece.part == box.part and all(
        a - start >= 0 and a + n <= start + size and a - start == b - at
        for a, n, b, start, size, at in zip(piece.start, piece.size, piece.at, box.start, box.size, box.at, strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_all_tensors_are_streamed_once_and_each_stages_layers_in_their_order(schedule: Schedule) -> None:
    policy = [entry for bucket in schedule.buckets if bucket.target == "policy" for entry in bucket.entries]
    params = [param for param in params_of(schedule.config) if param.where != Where.MTP]
    assert sorted(entry.name for entry in policy) == sorted(part.name for param in params for part in param.parts)
    assert [entry.param.where for entry in policy] == sorted((entry.param.where for entry in policy), key=ORDER.index)
    for stage in schedule.layout.stage_layers(schedule.config.num_layers):
        layers = [entry.param.layer or 0 for entry in policy if entry.param.layer in stage]
        assert layers == sorted(layers)
    draft = [entry for bucket in schedule.buckets if bucket.target == "draft" for entry in bucket.entries]
    mtp = {part.name for param in params_of(schedule.config) if param.where == Where.MTP for part in param.parts}
    assert not draft or mtp <= {entry.name for entry in draft}


@settings(max_examples=40, deadline=None)
@given(schedules())
def test_places_do_not_overlap_and_fit_the_buffer(schedule: Schedule) -> None:
    for bucket, number in itertools.product(schedule.buckets, range(len(schedule.receivers))):
        slices, size = schedule.slices(bucket.index, number)
        spans = []
        for entry_slice in slices:
            spans.append((entry_slice.offset, entry_slice.offset + entry_slice.entry.bytes))
            if entry_slice.scale_offset is not None:
                assert entry_slice.scale_offset % 64 == 0
                spans.append((entry_slice.scale_offset, entry_slice.scale_offset + 4))
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        assert not spans or spans[-1][1] <= size <= schedule.capacity(number, bucket.index % BUFFERS)


def test_buckets_respect_the_buffer_but_for_a_tensor_that_is_larger_alone() -> None:
    config = ModelConfig.from_hf(with_fp8(DEEPSEEK))
    receivers = receivers_of(config, [0], [engine_plan(0, {0: (0,)})])
    schedule = make_schedule(config, ParallelLayout(), [0], receivers, 20_000)
    assert len(schedule.buckets) > 3
    assert all(schedule.slices(bucket.index, 0)[1] <= 20_000 for bucket in schedule.buckets)
    schedule = make_schedule(config, ParallelLayout(), [0], receivers, 4096)
    large = [bucket for bucket in schedule.buckets if schedule.slices(bucket.index, 0)[1] > 4096]
    assert large
    assert all(len(bucket.entries) == 1 for bucket in large)
    with pytest.raises(BadInput, match="--update-weight-buffer-size 0"):
        make_schedule(config, ParallelLayout(), [0], receivers, 0)


@pytest.mark.e2e
@pytest.mark.parametrize(("experts", "size"), [(256, 64), (8, 3), (5, 8)])
def test_experts_are_placed_as_in_vllm(experts: int, size: int) -> None:
    workers = [experts_of(range(worker, worker + 1), size, experts) for worker in range(size)]
    assert sorted(expert for mine in workers for expert in mine) == list(range(experts))
    assert max(map(len, workers)) - min(map(len, workers)) <= 1
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    for worker, mine in enumerate(workers):
        local, table = determine_expert_map(size, worker, experts)[:2]
        assert local == len(mine)
        assert table is None or mine == {expert for expert in range(experts) if table[expert] >= 0}


def test_experts_of_a_bucket_come_from_all_sources_in_turn() -> None:
    """Else one rank after the other would quantise, while all others wait."""
    config = ModelConfig.from_hf(with_fp8(DEEPSEEK))
    assert config.moe is not None
    experts = config.moe.num_experts
    receivers = receivers_of(config, [0, 0], [engine_plan(0, {1: (0,)})])
    schedule = make_schedule(config, ParallelLayout(2, ep=2), [0, 0], receivers, 10**9)
    params: dict[int | None, list[tuple[int, str]]] = {}
    for entry in schedule.buckets[0].entries:
        if entry.param.expert is not None:
            row = params.setdefault(entry.param.layer, [])
            if (place := (entry.param.expert // (experts // 2), entry.param.name)) not in row:
                row.append(place)
    assert params
    for row in params.values():
        assert [source for source, _ in row] == [0, 1] * experts, "fc1 and fc2 of an expert of each in turn"


def layers_open_at_once(schedule: Schedule, receiver: int) -> int:
    """Most layers that a worker has in part."""
    parts: Counter[int | None] = Counter()
    stream = [entry for bucket in schedule.buckets for entry in bucket.entries if entry.param.where == Where.DECODER]
    mine = [entry.param.layer for entry in stream if schedule.receivers[receiver].needs(entry)]
    whole, most = Counter(mine), 0
    for layer in mine:
        parts[layer] += 1
        most = max(most, sum(0 < parts[layer] < whole[layer] for layer in parts))
    return most


@pytest.mark.parametrize(("buffer", "open_at_once"), [(10**6, 4), (30_000, 2), (1000, 1)])
def test_layers_of_all_stages_go_by_turns_as_far_as_the_engine_can_keep_them(buffer: int, open_at_once: int) -> None:
    config = ModelConfig.from_hf({**with_fp8(DEEPSEEK), "num_hidden_layers": 8})
    receivers = receivers_of(config, [0] * 4, [engine_plan(0, {1: (0,)})])
    schedule = make_schedule(config, ParallelLayout(4, pp=4), [0] * 4, receivers, buffer)
    assert layers_open_at_once(schedule, 0) == open_at_once
    for bucket in schedule.buckets if buffer == 10**6 else ():
        layers = {entry.param.layer for entry in bucket.entries if entry.param.where == Where.DECODER}
        assert {layer // 2 for layer in layers if layer is not None} == {0, 1, 2, 3}


def r1() -> Schedule:
    """DeepSeek-R1 on 16 nodes as in the recipe: TP8 PP4 CP4 EP32, two engines of 8 nodes with 64 expert ranks."""
    config = ModelConfig.from_hf(DEEPSEEK_R1)
    layout = ParallelLayout(128, tp=8, pp=4, cp=4, ep=32, last_stage_layers=13)
    nodes = [rank // 8 for rank in range(128)]
    gpus = tuple(range(8))
    engines = [
        engine_plan(i, {8 * i + n: gpus for n in range(8)}, tensor=8, data=8, expert_parallel=True) for i in range(2)
    ]
    return make_schedule(config, layout, nodes, receivers_of(config, nodes, engines), 512 * 2**20)


def test_the_recipes_sync_sends_what_the_nodes_need_and_quantises_on_the_shard() -> None:
    schedule = r1()
    config = schedule.config
    assert len(schedule.receivers) == 16
    assert all(len(receiver.experts or ()) == 32 for receiver in schedule.receivers)

    def stored(params: list[Param]) -> int:
        quantised = sum(math.prod(part.shape) for param in params for part in param.parts if part.quantised)
        plain = sum(math.prod(part.shape) for param in params for part in param.parts if not part.quantised)
        return int(quantised * (1 + 4 / 128**2)) + 2 * plain

    policy = [param for param in params_of(config) if param.where != Where.MTP]
    dense = stored([param for param in policy if param.expert is None])
    routed = stored([param for param in policy if param.expert is not None])
    sent = sum(schedule.slices(bucket.index, 0)[1] for bucket in schedule.buckets)
    assert len(schedule.buckets) < 1.1 * sent / (512 * 2**20)
    assert sent <= 1.05 * (dense + routed / 8)
    first = schedule.buckets[len(schedule.buckets) // 2]
    assert all(move.on_shard for move in schedule.moves(first.index))


def test_the_recipes_workers_get_their_own_experts_only() -> None:
    """DeepSeek-R1 on the GPUs that it trains on: every worker gets the dense weights and four experts a layer."""
    nodes, slots = [rank // 8 for rank in range(128)], [rank % 8 for rank in range(128)]
    config = ModelConfig.from_hf(DEEPSEEK_R1)
    gpus = tuple(range(8))
    engines = [
        engine_plan(i, {8 * i + n: gpus for n in range(8)}, tensor=8, data=8, expert_parallel=True) for i in range(2)
    ]
    receivers = receivers_of(config, nodes, engines, gpus=slots)
    assert len(receivers) == 128
    assert all(len(receiver.experts or ()) == 4 for receiver in receivers)
    assert [receiver.publishers for receiver in receivers] == [(rank,) for rank in range(128)]
    layout = ParallelLayout(128, tp=8, pp=4, cp=4, ep=32, last_stage_layers=13)
    schedule = make_schedule(config, layout, nodes, receivers, 512 * 2**20)
    parts = [(param, part) for param in params_of(config) if param.where != Where.MTP for part in param.parts]

    def stored(routed: bool) -> int:
        sizes = [
            math.prod(part.shape) * (1 if part.quantised else 2)
            for param, part in parts
            if (param.expert is not None) == routed
        ]
        return sum(sizes)

    sent = sum(schedule.slices(bucket.index, 17)[1] for bucket in schedule.buckets)
    assert sent <= 1.05 * (stored(False) + stored(True) / 64)


def test_planning_loads_no_torch() -> None:
    code = "import sys, vime.sync.schedule, vime.sync.session; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=patience.PROCESS).returncode == 0
