"""What preflight's findings lead to: which nodes are taken, which are refused and why, which ports are free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch_stub import make_plan, preflight

from vime.errors import Cause
from vime.launch.binding import bind, free_offset, port_numbers
from vime.launch.failure import RunFailed
from vime.launch.preflight import group_limits, look
from vime.launch.reports import Report
from vime.launch.steps import Place, Step
from vime.planning import ports
from vime.planning.types import Plan


class AllocationOf7:
    """The part of a runner that bind asks."""

    job, restart = "7", 0


def finding(number: int, **changes: Any) -> dict[str, Any]:
    facts = {
        "host": f"node{number:02d}", "address": f"10.0.0.{number}", "interface": "eth0", "memory_available": 10**12,
        "cpus": 64, "versions": {"python": "3.11.2", "torch": "2.13.0"}, "run_folder": None, "listening": [],
    }  # fmt: skip
    return {**facts, **changes}


def bound(plan: Plan, findings: list[dict[str, Any]]) -> Any:
    places = tuple(Place(i, facts["host"]) for i, facts in enumerate(findings))
    step = Step(plan.stages[0], places, [], Path("launcher.log"))
    step.reports = [Report(i, "result", facts) for i, facts in enumerate(findings)]
    return bind(plan, AllocationOf7(), step, end_time=5.0)  # pyright: ignore[reportArgumentType]


def plan_of(tmp_path: Path, nodes: int, **options: Any) -> Plan:
    return make_plan(tmp_path, [preflight(tmp_path, nodes)], nodes=nodes, kind="slurm", host_bytes=10**9, **options)


def test_logical_nodes_follow_the_order_of_the_allocation(tmp_path: Path) -> None:
    binding = bound(plan_of(tmp_path, 2), [finding(4), finding(1)]).binding
    assert [(node.index, node.host, node.slurm_index) for node in binding.nodes] == [(0, "node04", 0), (1, "node01", 1)]
    assert (binding.job_id, binding.end_time) == ("7", 5.0)


BAD = [
    ({"memory_available": 5 * 10**8}, "node02: available host memory is 0.5 GB, needs 1.0 GB"),
    ({"versions": {"python": "3.12.1", "torch": "2.13.0"}}, "node02: version of python is 3.12.1, needs 3.11.2"),
    ({"versions": {"python": "3.11.2"}}, "node02: version of torch is missing, needs 2.13.0"),
    ({"run_folder": "cannot be written: Read-only file system"}, "node02: run folder"),
    ({"address": "127.0.0.1"}, "node02: address is 127.0.0.1"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_a_bad_node_ends_the_run_with_its_name_the_value_and_the_need(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(RunFailed) as caught:
        bound(plan_of(tmp_path, 3), [finding(1), finding(2, **change), finding(3)])
    failure = caught.value.failure
    assert (failure.cause, failure.node) == (Cause.PREFLIGHT, "node02")
    assert text in failure.text


@pytest.mark.parametrize(("change", "text"), BAD)
def test_with_a_spare_a_bad_node_is_left_out(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    plan = plan_of(tmp_path, 2, spares=1)
    found = bound(plan, [finding(1), finding(2, **change), finding(3)])
    assert [(node.host, node.slurm_index) for node in found.binding.nodes] == [("node01", 0), ("node03", 2)]
    assert text in found.text
    assert found.table[1]["result"] != "fit"


def test_a_node_without_a_result_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2)
    step = Step(plan.stages[0], (Place(0, "node01"), Place(1, "node02")), [], Path("launcher.log"))
    step.reports = [Report(0, "result", finding(1))]
    with pytest.raises(RunFailed, match="node02"):
        bind(plan, AllocationOf7(), step, end_time=None)  # pyright: ignore[reportArgumentType]


def test_ports_that_are_taken_on_a_node_are_avoided_on_all(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2)
    own = ports.offset_of_job(plan, 7)
    assert free_offset(plan, 7, {0: finding(1), 1: finding(2)}) == own
    taken = finding(2, listening=[plan.ports.gcs + own])
    other = free_offset(plan, 7, {0: finding(1), 1: taken})
    assert other != own
    assert other in ports.offsets(plan)


def test_no_free_ports_end_the_run(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1)
    everywhere = finding(1, listening=[plan.ports.gcs + offset for offset in ports.offsets(plan)])
    with pytest.raises(RunFailed, match=f"node01: port {plan.ports.gcs} is taken"):
        free_offset(plan, 7, {0: everywhere})
    assert plan.ports.gcs in set(port_numbers(plan))


def test_this_machine_tells_everything_that_is_asked(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, [preflight(tmp_path, 1)])
    (tmp_path / "control").mkdir()
    facts = look(plan)
    assert facts["run_folder"] is None
    assert facts["memory_available"] > 10**8
    assert facts["versions"]["python"].startswith("3.")
    assert set(facts) >= set(finding(1))


def test_the_least_of_all_memory_limits_counts(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    for name, limit, used in (("job", "1000", "100"), ("job/step", "max", "50"), ("job/step/task", "800", "50")):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(limit)
        (groups / name / "memory.current").write_text(used)
    process = tmp_path / "cgroup"
    process.write_text("0::/job/step/task\n")
    assert sorted(group_limits(process, groups)) == [750, 900]
