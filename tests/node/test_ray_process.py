"""Ray's arguments and environment on a node; real Ray is in tests/e2e/test_ray_node.py and test_slurm_ray.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, preflight
from vime.errors import VimeError
from vime.node import ray_node
from vime.node.ray_process import gcs_address, pin_resource, ray_parameters
from vime.run.plan import Binding, BoundNode, Plan


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(tmp_path, [preflight(tmp_path, 2)], nodes=2)


BINDING = Binding(
    nodes=tuple(BoundNode(index=i, host=f"node0{i + 1}", address=f"10.0.0.{i + 1}") for i in range(2)), port_offset=100
)


def test_the_head_has_the_gcs_and_a_worker_is_told_where_it_is(plan: Plan) -> None:
    head, worker = (ray_parameters(plan, BINDING, node, temp_dir="/tmp/job/ray", cpus=8) for node in range(2))
    assert (head["gcs_server_port"], head["temp_dir"]) == (plan.ports.gcs + 100, "/tmp/job/ray")
    assert "gcs_address" not in head
    assert not {"gcs_server_port", "temp_dir"} & set(worker)
    assert worker["gcs_address"] == gcs_address(plan, BINDING) == f"10.0.0.1:{plan.ports.gcs + 100}"
    assert worker["node_ip_address"] == "10.0.0.2"
    assert worker["resources"] == {pin_resource(1): 1}


def test_every_port_is_the_plans_with_the_jobs_offset(plan: Plan) -> None:
    """With a port of 0 a raylet waits for its helper to say which one it found."""
    given = ray_parameters(plan, BINDING, 1, temp_dir="/tmp", cpus=8)
    ports = {name: value for name, value in given.items() if name.endswith("_port")}
    assert set(ports.values()) <= {port + 100 for port in plan.ports.model_dump().values()}
    assert len(set(ports.values())) == len(ports) == 8


def test_a_small_node_offers_a_cpu_for_every_rank(plan: Plan) -> None:
    assert ray_parameters(plan, BINDING, 0, temp_dir="/tmp", cpus=1)["num_cpus"] == 2
    assert ray_parameters(plan, BINDING, 0, temp_dir="/tmp", cpus=64)["num_cpus"] == 64


def test_a_port_that_is_taken_is_named(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_node, "listening_ports", lambda: {plan.ports.gcs + 100})
    with pytest.raises(VimeError, match=f"port {plan.ports.gcs + 100} \\(gcs\\) is taken on node01"):
        ray_node.check_ports(plan, BINDING, 0)
    ray_node.check_ports(plan, BINDING, 1)
