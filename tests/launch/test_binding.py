"""From the examined allocation to the binding: which nodes are taken, in what order, which ports are free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch_stub import make_plan, preflight
from tests.support.preflight_findings import finding
from vime.errors import Cause
from vime.launch import binding
from vime.launch.binding import Examined, bind, by_switch, examine, free_offset, port_numbers, refill, table
from vime.launch.failure import RunFailed
from vime.launch.steps import AllocatedNode, Step
from vime.node.checks import Known
from vime.planning import ports
from vime.run.messages import Report
from vime.run.plan import Binding, BoundNode, Plan


class AllocationOf7:
    """The part of a runner that bind asks."""

    job, restart = "7", 0


def examined(
    plan: Plan, findings: list[dict[str, Any]], known: Known | None = None, switches: dict[int, str] | None = None
) -> Examined:
    places = tuple(AllocatedNode(i, facts["host"]) for i, facts in enumerate(findings))
    step = Step(plan.stages[0], places, [], Path("launcher.log"))
    step.reports = [Report(i, "result", facts) for i, facts in enumerate(findings)]
    return examine(plan, step, known or Known(canary="word"), switches or {})


def bound(plan: Plan, found: Examined, *, everyone: bool = False) -> Any:
    return bind(plan, AllocationOf7(), found, end_time=5.0, everyone=everyone)  # pyright: ignore[reportArgumentType]


def plan_of(tmp_path: Path, nodes: int, **options: Any) -> Plan:
    return make_plan(tmp_path, [preflight(tmp_path, nodes)], nodes=nodes, kind="slurm", host_bytes=10**9, **options)


def test_logical_nodes_follow_the_order_of_the_allocation(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2)
    made = bound(plan, examined(plan, [finding(4), finding(1)]))
    assert [(node.index, node.host, node.slurm_index) for node in made.nodes] == [(0, "node04", 0), (1, "node01", 1)]
    assert (made.job_id, made.end_time) == ("7", 5.0)


def test_without_a_spare_a_bad_node_ends_the_run_and_is_named(tmp_path: Path) -> None:
    small = finding(2, memory_available=5 * 10**8)
    with pytest.raises(RunFailed) as caught:
        examined(plan_of(tmp_path, 3), [finding(1), small, finding(3)])
    failure = caught.value.failure
    assert (failure.cause, failure.node) == (Cause.PREFLIGHT, "node02")
    assert "node02: available host memory is 0.5 GB, needs 1.0 GB (2 of 3 nodes are fit)" in failure.text


def test_with_a_spare_a_bad_node_is_left_out(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2, spares=1)
    found = examined(plan, [finding(1), finding(2, memory_available=5 * 10**8), finding(3)])
    made = bound(plan, found)
    assert [(node.host, node.slurm_index) for node in made.nodes] == [("node01", 0), ("node03", 2)]
    assert "left out: node02: available host memory" in found.text
    assert table(found)[1]["result"] == "available host memory is 0.5 GB, needs 1.0 GB"


def test_a_node_that_failed_twice_makes_the_run_start_again_elsewhere(tmp_path: Path) -> None:
    """Where nothing else is wrong, and there is no spare."""
    with pytest.raises(RunFailed) as caught:
        examined(plan_of(tmp_path, 2), [finding(1), finding(2)], Known(canary="word", failures={"node02": 2}))
    assert (caught.value.failure.cause, caught.value.failure.node) == (Cause.NODE_FAILURE, "node02")


def test_spares_stand_behind_the_nodes_of_the_plan_while_the_network_is_measured(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2, spares=1)
    made = bound(plan, examined(plan, [finding(1), finding(2), finding(3)]), everyone=True)
    assert [node.host for node in made.nodes] == ["node01", "node02", "node03"]


def test_active_rdma_ports_are_bound(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1)
    made = bound(plan, examined(plan, [finding(1, rdma={"mlx5_0:1": "ACTIVE", "mlx5_1:1": "DOWN"})]))
    assert made.nodes[0].rdma == ("mlx5_0:1",)


def test_nodes_of_one_switch_stand_together() -> None:
    assert by_switch([0, 1, 2, 3], {0: "a", 1: "b", 2: "a", 3: "b"}, 1) == [0, 2, 1, 3]
    assert by_switch([0, 1, 2], {}, 2) == [0, 1, 2]


def test_an_engine_shares_a_switch_where_it_can() -> None:
    """Three nodes on the first switch, three on the second, engines of two nodes: two engines have a switch each."""
    leaves = {place: "a" if place < 3 else "b" for place in range(6)}
    assert by_switch(list(range(6)), leaves, 2) == [0, 1, 3, 4, 2, 5]


def test_what_was_found_is_kept_as_json(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1, spares=1)
    found = examined(plan, [finding(1), finding(2, address="127.0.0.1")])
    binding.write_report(tmp_path, found, table(found))
    content = json.loads((tmp_path / "preflight.json").read_text())
    assert content["problems"][0]["node"] == "node02"
    assert content["problems"][0]["check"] == "address"
    assert [row["result"] for row in content["nodes"]] == [
        "fit",
        "address is 127.0.0.1, needs one of its own that other nodes reach",
    ]
    assert content["findings"][1]["address"] == "127.0.0.1"


def test_a_node_without_a_result_is_named(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 2)
    step = Step(plan.stages[0], (AllocatedNode(0, "node01"), AllocatedNode(1, "node02")), [], Path("launcher.log"))
    step.reports = [Report(0, "result", finding(1))]
    with pytest.raises(RunFailed, match="node02"):
        examine(plan, step, Known(canary="word"), {})


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


def refilled(tmp_path: Path, found: dict[str, object], vacant: Sequence[int] = (1,)) -> tuple[Examined, Binding]:
    """A run on two nodes of three, one of which is lost, after a preflight of the third."""
    plan = plan_of(tmp_path, 2)
    before = Examined({0: finding(1), 1: finding(2), 2: finding(3)}, [])
    nodes = tuple(BoundNode(index=i, host=f"node0{i + 1}", address=f"10.0.0.{i + 1}", slurm_index=i) for i in (0, 1))
    first = Binding(job_id="7", nodes=nodes, port_offset=10)
    step = Step(plan.stages[0], (AllocatedNode(2, "node03"),), [], Path("launcher.log"))
    step.reports = [Report(0, "result", finding(3, canary="new", **found))]
    return refill(plan, first, vacant, before, step, Known(canary="new"))


def test_a_spare_takes_the_logical_node_of_a_lost_one_and_all_others_keep_theirs(tmp_path: Path) -> None:
    found, after = refilled(tmp_path, {})
    assert [(node.index, node.host, node.slurm_index) for node in after.nodes] == [(0, "node01", 0), (1, "node03", 2)]
    assert after.port_offset == 10
    assert found.fit == [0, 2]
    assert sorted(found.findings) == [0, 2]


@pytest.mark.parametrize(
    ("found", "vacant", "told"),
    [
        pytest.param({"run_folder": "read-only"}, (1,), "read-only", id="not fit"),
        pytest.param({"versions": {"python": "3.12.0", "torch": "2.13.0"}}, (1,), "3.12.0", id="unlike the others"),
        pytest.param({}, (0, 1), "1 spares are fit of 2", id="too few"),
    ],
)
def test_spares_that_do_not_do_are_refused(
    tmp_path: Path, found: dict[str, object], vacant: Sequence[int], told: str
) -> None:
    with pytest.raises(RunFailed, match=told):
        refilled(tmp_path, found, vacant)


def test_a_spare_on_which_a_port_of_the_run_is_taken_is_refused(tmp_path: Path) -> None:
    port = plan_of(tmp_path, 2).ports.gcs + 10
    with pytest.raises(RunFailed, match=f"port {port} is taken"):
        refilled(tmp_path, {"listening": [port]})
