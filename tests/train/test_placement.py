"""Where actors go: every slot once, pinned to its node; the threads a rank gets."""

from collections import Counter

import pytest

from vime.errors import VimeError
from vime.recipe.parallel import ParallelLayout
from vime.run.plan import Binding, BoundNode
from vime.train.actors import threads_per_rank
from vime.train.placement import Slot, WrongPlace, bundles, slots, verify_gpu, verify_here


@pytest.fixture
def r1_plan():
    from vime.planning.build import Checks, make_plan
    from vime.planning.cluster import load_cluster
    from vime.recipe.load import load_recipe

    checks = Checks(inputs=False, run_folder=False)
    recipe = load_recipe("deepseek-r1", [])
    return make_plan(recipe, cluster=load_cluster("example"), nodes=16, base_dir="/base", run_name="r", checks=checks)


def test_every_gpu_of_the_recipe_has_one_bundle_pinned_to_its_node(r1_plan):
    places = slots(r1_plan)
    assert Counter(slot.node for slot in places) == dict.fromkeys(range(16), 8)
    assert len(set(places)) == 128
    for slot, bundle in zip(places, bundles(r1_plan), strict=True):
        assert bundle["GPU"] == 1
        assert f"slurm_rank_{slot.node}" in bundle


def test_threads_are_the_nodes_cores_divided_by_its_ranks(r1_plan):
    assert threads_per_rank(r1_plan, 0, 96) == 12
    assert threads_per_rank(r1_plan, 0, 4) == 1


def test_an_actor_on_another_host_says_where_it_should_be(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node07")
    binding = Binding(nodes=(BoundNode(index=0, host="node03", address="10.0.0.3"),))
    with pytest.raises(WrongPlace, match=r"trainer rank 0 is planned on node 0 \(node03\) but woke up on node07"):
        verify_here(binding, 0, "trainer rank 0")
    assert issubclass(WrongPlace, VimeError)


def test_an_actor_without_its_gpu_says_which_one_is_missing(monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "node07")
    verify_gpu(1, 5, "trainer rank 0")
    with pytest.raises(WrongPlace, match="trainer rank 0 is planned on GPU 5 of node07, but CUDA sees 0 such GPUs"):
        verify_gpu(0, 5, "trainer rank 0")


def test_slots_are_shared_by_colocated_ranks_and_engines(r1_plan):
    assert Slot(0, 0) in slots(r1_plan)
    assert isinstance(r1_plan.layout, ParallelLayout)
