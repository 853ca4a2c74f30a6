"""Every rank and every engine rank has one place, in Megatron's order; what does not fit is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.errors import BadInput
from vime.planning.layout import Slots, divide_slots, place_engines, place_trainer, trainer_layout
from vime.recipe.load import change, load_recipe
from vime.recipe.parallel import ParallelLayout


def slots(nodes: int, gpus: int) -> Slots:
    every = tuple((node, gpu) for node in range(nodes) for gpu in range(gpus))
    return Slots(nodes, gpus, every, every)


def test_the_r1_recipe_takes_128_ranks_and_two_engines_of_eight_nodes():
    recipe = load_recipe("deepseek-r1")
    layout, where = trainer_layout(recipe), divide_slots(recipe, 8)
    assert (layout.world_size, layout.tp, layout.pp, layout.cp, layout.dp) == (128, 8, 4, 4, 1)
    assert (layout.ep, layout.edp) == (32, 1)
    assert [len(layers) for layers in layout.stage_layers(61)] == [16, 16, 16, 13]
    ranks = place_trainer(layout, where)
    assert {rank.node for rank in ranks if rank.pp == 2} == {8, 9, 10, 11}
    engines = place_engines(recipe, where)
    assert [engine.nodes for engine in engines] == [tuple(range(8)), tuple(range(8, 16))]
    assert all((engine.data_parallel_size, engine.tensor_parallel_size) == (8, 8) for engine in engines)
    assert all(engine.gpus == (tuple(range(8)),) * 8 for engine in engines)


powers = st.sampled_from([1, 2, 4])


@given(nodes=st.integers(1, 6), gpus=st.sampled_from([1, 2, 4, 8]), tp=powers, cp=powers, pp=powers, ep=powers)
def test_every_rank_is_placed_once_with_its_tensor_parallel_group_in_one_node(
    nodes: int, gpus: int, tp: int, cp: int, pp: int, ep: int
):
    world = nodes * gpus
    if world % (tp * cp * pp) or world % (ep * pp) or gpus % tp:
        return
    layout = ParallelLayout(world_size=world, tp=tp, cp=cp, pp=pp, ep=ep)
    ranks = place_trainer(layout, slots(nodes, gpus))
    assert [rank.rank for rank in ranks] == list(range(world))
    assert len({(rank.node, rank.gpu) for rank in ranks}) == world
    assert len({(rank.tp, rank.cp, rank.dp, rank.pp) for rank in ranks}) == world
    assert len({(rank.etp, rank.ep, rank.edp, rank.pp) for rank in ranks}) == world
    groups: dict[tuple[int, ...], set[int]] = {}
    for rank in ranks:
        groups.setdefault((rank.cp, rank.dp, rank.pp), set()).add(rank.node)
    assert all(len(group) == 1 for group in groups.values())


@settings(deadline=None)
@given(
    nodes=st.integers(1, 8),
    gpus=st.sampled_from([1, 2, 4, 8]),
    size=st.sampled_from([1, 2, 4, 8, 16, 32]),
    data_parallel=powers,
)
def test_every_gpu_serves_one_engine_on_contiguous_nodes(nodes: int, gpus: int, size: int, data_parallel: int):
    recipe = load_recipe("tiny-qwen3", ["--vllm-data-parallel-size", str(data_parallel)])
    recipe = change(recipe, engine={"rollout_num_gpus_per_engine": size})
    try:
        engines = place_engines(recipe, slots(nodes, gpus))
    except BadInput:
        fits = (nodes * gpus) % size == 0 and (size % gpus == 0 or gpus % size == 0) and size % data_parallel == 0
        assert not fits or size // data_parallel > gpus
        return
    used = [(node, gpu) for e in engines for node, own in zip(e.nodes, e.gpus, strict=True) for gpu in own]
    assert sorted(used) == [(node, gpu) for node in range(nodes) for gpu in range(gpus)]
    for engine in engines:
        assert list(engine.nodes) == list(range(engine.nodes[0], engine.nodes[-1] + 1))
        assert engine.tensor_parallel_size * engine.data_parallel_size == size
        assert all(len(own) % engine.tensor_parallel_size == 0 for own in engine.gpus)


@settings(deadline=None, max_examples=60)
@given(tp=powers, cp=powers, pp=powers, ep=powers, etp=st.sampled_from([1, 2]), more=st.integers(1, 3))
def test_coordinates_are_those_of_megatrons_rank_generator(tp: int, cp: int, pp: int, ep: int, etp: int, more: int):
    parallel_state = pytest.importorskip("megatron.core.parallel_state")
    world = tp * cp * pp * ep * etp * more
    layout = ParallelLayout(world_size=world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    order = "tp-cp-ep-dp-pp"
    dense = parallel_state.RankGenerator(tp=tp, ep=1, dp=layout.dp, pp=pp, cp=cp, order=order)
    experts = parallel_state.RankGenerator(tp=etp, ep=ep, dp=layout.edp, pp=pp, cp=1, order=order)
    kinds = (("tp", dense, "tp"), ("cp", dense, "cp"), ("dp", dense, "dp"), ("pp", dense, "pp"))
    for field, generator, name in (*kinds, ("ep", experts, "ep"), ("etp", experts, "tp"), ("edp", experts, "dp")):
        for group in generator.get_ranks(name):
            assert [getattr(layout.coordinates(rank), field) for rank in group] == list(range(len(group)))


def test_engines_apart_from_the_trainer_have_nodes_after_its_own():
    recipe = load_recipe("qwen3-4b", ["--no-colocate", "--rollout-num-gpus", "12", "--actor-num-nodes", "2"])
    where = divide_slots(recipe, 8)
    assert where.nodes == 4
    assert {node for node, _ in where.actor} == {0, 1}
    assert [sum(node == each for node, _ in where.rollout) for each in (2, 3)] == [8, 4]
    assert len(place_engines(recipe, where)) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout-num-gpus-per-engine", "3"], "does not divide the 128 GPUs of all engines"),
        (["--vllm-data-parallel-size", "3"], "--vllm-data-parallel-size 3 does not divide the 64 GPUs of an engine"),
        (["--vllm-data-parallel-size", "1"], "tensor parallel over 64, more than fits a node of 8 GPUs"),
        (["--rollout-num-gpus", "64"], "with --colocate engines take the trainer's 128 GPUs"),
        (["--no-colocate"], "--rollout-num-gpus is not set"),
    ],
)
def test_engines_that_do_not_fit_are_refused(flags: list[str], message: str):
    recipe = load_recipe("deepseek-r1", flags)
    with pytest.raises(BadInput, match=message):
        place_engines(recipe, divide_slots(recipe, 8))


def test_tensor_parallelism_over_nodes_is_refused():
    with pytest.raises(BadInput, match="tensor parallelism stays inside a node"):
        place_trainer(ParallelLayout(world_size=8, tp=8), slots(2, 4))


def test_on_one_machine_engines_have_the_gpus_after_the_trainers():
    options = {"colocate": False, "actor_num_nodes": 1, "actor_num_gpus_per_node": 2, "rollout_num_gpus": 3}
    recipe = change(load_recipe("tiny-qwen3"), resources=options)
    where = divide_slots(recipe, 8, one_node=True)
    assert (where.nodes, where.gpus_per_node) == (1, 5)
    assert [engine.gpus for engine in place_engines(recipe, where)] == [((2,),), ((3,),), ((4,),)]
