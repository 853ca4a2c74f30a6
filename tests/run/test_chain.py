"""The jobs of a chain: each stage in one, with the services before it, and no larger than it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, preflight, ray_stages, stub
from vime.errors import BadInput
from vime.run.chain import find_link, links, part
from vime.run.plan import Plan


def plan_of(tmp_path: Path, **options) -> Plan:
    stages = [
        preflight(tmp_path, 16).model_copy(update={"deadline_s": 60.0}),
        stub("cast", "", nodes=range(8), deadline_s=1000),
        stub("convert", "", nodes=range(4)),
        *(stage.model_copy(update={"gpus_per_node": 8}) for stage in ray_stages(tmp_path, 16)),
        stub("train", "", deadline_s=100 * 3600),
        stub("report", ""),
    ]
    cluster = {"gpus_per_node": 8, "gpu_request": "gpus-per-node", "time_limit_minutes": 2880}
    return make_plan(tmp_path, stages, nodes=16, kind="slurm", cluster=cluster, **{"shape": "chain", **options})


def test_a_stage_is_a_job_with_its_services_and_a_preflight_of_its_own(tmp_path: Path) -> None:
    chain = links(plan_of(tmp_path))
    assert [[stage.name for stage in link.stages] for link in chain] == [
        ["preflight", "cast"],
        ["preflight", "convert"],
        ["preflight", "ray-head", "ray-workers", "train"],
        ["preflight", "report"],
    ]
    assert [(link.after, link.before) for link in chain] == [
        (None, "convert"), ("cast", "train"), ("convert", "report"), ("train", None)
    ]  # fmt: skip
    assert [len(link.stages[0].nodes) for link in chain] == [8, 4, 16, 1]


def test_the_first_job_of_a_chain_rehearses_before_it_casts(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    head, *rest = plan.stages
    rehearsal = stub("rehearsal", "", gpus_per_node=8)
    rehearsed = plan.model_copy(update={"stages": (head, rehearsal, *rest)})
    assert [[stage.name for stage in link.stages] for link in links(rehearsed)][:2] == [
        ["preflight", "rehearsal", "cast"],
        ["preflight", "convert"],
    ]
    assert part(rehearsed, links(rehearsed)[0]).cluster.gpus_per_node == 0


def test_the_stages_of_a_chain_are_the_plans_own(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    jobs = [stage for link in links(plan) for stage in link.stages if stage.name != "preflight"]
    assert jobs == [stage for stage in plan.stages if stage.name != "preflight"]


def test_a_job_has_the_nodes_gpus_memory_and_time_of_its_stage(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, host_bytes=10**12)
    parts = {link.name: part(plan, link) for link in links(plan)}
    assert {name: len(own.nodes) for name, own in parts.items()} == {"cast": 8, "convert": 4, "train": 16, "report": 1}
    assert {name: own.cluster.gpus_per_node for name, own in parts.items()} == {
        "cast": 0, "convert": 0, "train": 8, "report": 0
    }  # fmt: skip
    assert [node.host_memory.total_bytes for node in parts["cast"].nodes] == [0] * 8
    assert [node.host_memory.total_bytes for node in parts["train"].nodes] == [10**12] * 16
    # 60 s of preflight, 1000 s of cast and 300 s besides are 23 minutes; training has what the profile gives.
    assert parts["cast"].cluster.time_limit_minutes == 23
    assert parts["train"].cluster.time_limit_minutes == 2880
    assert (parts["cast"].signal_lead_s, parts["train"].signal_lead_s) == (300, 300)
    assert part(plan, None) is plan


def test_links_are_found_by_name_in_a_chain_alone(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    link = find_link(plan, "convert")
    assert link is not None
    assert link.index == 1
    with pytest.raises(BadInput, match="--stage is 'ray-head': a job of this chain is one of cast, convert, train"):
        find_link(plan, "ray-head")
    one = plan.model_copy(update={"shape": "allocation"})
    assert find_link(one, None) is None
    with pytest.raises(BadInput, match="the run is one job"):
        find_link(one, "train")
