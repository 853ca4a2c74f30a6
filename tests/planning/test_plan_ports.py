"""Ports: outside every ephemeral range, each of its own, apart from another job's."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from vime.planning.build import Checks, make_plan
from vime.planning.ports import AUX_PORTS, blocks, moved, offset_of_job, offsets
from vime.recipe.load import load_recipe
from vime.run.plan import Cluster, Plan

NO_CHECKS = Checks(inputs=False, run_folder=False)


def plan_of(recipe: str, nodes: int, kind: str = "slurm") -> Plan:
    cluster = Cluster(name="test", kind=kind, gpus_per_node=8 if kind == "slurm" else 0)  # type: ignore[arg-type]
    return make_plan(load_recipe(recipe), cluster=cluster, nodes=nodes, base_dir="/base", checks=NO_CHECKS)


def ports_of_node(plan: Plan, node: int, offset: int = 0) -> list[int]:
    ports = moved(plan.ports, offset).model_dump()
    first, last = ports.pop("worker_first"), ports.pop("worker_last")
    taken = [*ports.values(), *range(first, last + 1)]
    for engine in plan.engines:
        if node in engine.nodes or plan.cluster.kind == "local":
            taken += [engine.port + offset, *range(engine.aux_port + offset, engine.aux_port + offset + AUX_PORTS)]
    return taken


def test_no_port_of_a_node_is_taken_twice():
    for plan in (plan_of("deepseek-r1", 16), plan_of("qwen3-4b", 1), plan_of("tiny-deepseek-r1", 4, "local")):
        for node in plan.nodes:
            taken = ports_of_node(plan, node.index)
            assert len(taken) == len(set(taken))


def test_every_offset_stays_below_all_ephemeral_ranges_and_apart_from_the_others():
    for plan in (plan_of("deepseek-r1", 16), plan_of("qwen3-4b", 1)):
        blocks_taken = [set(ports_of_node(plan, 0, offset)) for offset in offsets(plan)]
        assert len(blocks_taken) >= 8
        assert all(1024 < port < 9000 for taken in blocks_taken for port in taken)
        assert not any(a & b for a, b in itertools.combinations(blocks_taken, 2))
        assert not any({6379, 8080, 6817, 3306} & taken for taken in blocks_taken)


def test_jobs_submitted_one_after_another_do_not_meet():
    plan = plan_of("deepseek-r1", 16)
    assert offset_of_job(plan, 1000) != offset_of_job(plan, 1001)
    assert all(offset_of_job(plan, job) in offsets(plan) for job in range(1000, 1100))


@given(st.integers(1, 300))
def test_blocks_of_any_size_do_not_overlap(size: int):
    starts = blocks(size)
    assert all(b - a >= size for a, b in itertools.pairwise(starts))
    assert starts[-1] + size - 1 < 9000
