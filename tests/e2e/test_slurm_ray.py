"""Real Ray in a real allocation: up on every node, pinned as planned, with the job's token; gone when the run ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, preflight, ray_stages, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event
from vime.run.journal import read_events
from vime.schedulers.submission import submit

pytestmark = pytest.mark.e2e

DRIVER = """
import json, os, sys
from vime.node.ray_process import pin_resource
from vime.run.folder import read_binding, read_plan
from vime.train.__main__ import connect
from vime.train.placement import PIN, verify_here
run = os.environ["VIME_RUN"]
plan, binding = read_plan(run), read_binding(run)
connect(plan, binding)
import ray

nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}
assert set(nodes) == {node.address for node in binding.nodes}, nodes
for bound in binding.nodes:
    resources = nodes[bound.address]["Resources"]
    pins = [name for name in resources if name.startswith("slurm_rank_")]
    assert pins == [pin_resource(bound.index)], (bound, pins)
    assert resources["GPU"] == plan.nodes[bound.index].gpus, resources

@ray.remote(num_cpus=0)
def check(run, node):
    verify_here(read_binding(run), node, "the probe")
    return sorted(name for name in os.environ if name.startswith(("SLURM", "PMI")))

probes = [check.options(resources={pin_resource(node.index): PIN}).remote(run, node.index) for node in binding.nodes]
assert ray.get(probes, timeout=120) == [[]] * len(probes)
print("everything is where the plan says", flush=True)
"""

WITHOUT_TOKEN = """
import os, pathlib, subprocess, sys
from vime.node.ray_process import gcs_address
from vime.run.folder import read_binding, read_plan
run = os.environ["VIME_RUN"]
code = "import ray, sys; ray.init(address=sys.argv[1]); print('let in')"
env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
address = gcs_address(read_plan(run), read_binding(run))
done = subprocess.run([sys.executable, "-c", code, address], env=env, capture_output=True, text=True, timeout=120)
assert done.returncode != 0 and "let in" not in done.stdout, done.stdout
print("refused")
"""


@pytest.mark.parametrize("nodes", [2, 4])
def test_ray_is_up_pinned_and_gone(four_nodes: DevCluster, tmp_path: Path, nodes: int) -> None:
    run_dir = tmp_path / 'it\'s a "run" & größe $HOME'
    driver = stub("train", DRIVER, deadline_s=patience.JOB)
    plan = make_plan(
        run_dir, [preflight(run_dir, nodes), *ray_stages(run_dir, nodes), driver], nodes=nodes, kind="slurm"
    )
    job = submit(plan)
    wait_for_event(run_dir, "stage-ready", patience.JOB, stage="ray-workers")
    listening = four_nodes.on_node(0, "sh", "-c", "cat /proc/net/tcp /proc/net/tcp6").splitlines()
    assert wait_for_end(job, patience.JOB) == "COMPLETED", read_events(run_dir)[-1]
    assert "everything is where the plan says" in (run_dir / "logs/train/node00.log").read_text()
    four_nodes.assert_nothing_is_left(job, run_dir)
    dashboards = [line for line in listening if line.split()[1:2] == ["00000000:2041"]]
    assert not dashboards


def test_a_client_without_the_jobs_token_is_refused(four_nodes: DevCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stages = [preflight(run_dir, 1), *ray_stages(run_dir, 1), stub("train", WITHOUT_TOKEN, deadline_s=patience.JOB)]
    job = submit(make_plan(run_dir, stages, nodes=1, kind="slurm"))
    assert wait_for_end(job, patience.TRAINING) == "COMPLETED", read_events(run_dir)[-1]
    token = (run_dir / "secrets" / "ray_token").read_text().strip()
    for path in run_dir.rglob("*"):
        if path.is_file() and path.parent.name != "secrets":
            assert token not in path.read_text(errors="replace"), path


def test_a_worker_that_never_comes_is_named_at_the_deadline(four_nodes: DevCluster, tmp_path: Path) -> None:
    """Node 1's part of the service is a stub that starts no Ray."""
    run_dir = tmp_path / "run"
    head, workers = ray_stages(run_dir, 3, deadline_s=patience.NOTICE)
    code = (
        "import os, sys, time; from vime.node import ray_node; time.sleep(3600 * (os.environ['VIME_NODE'] == '2'));"
        f"sys.exit(ray_node.main(['--run', {str(run_dir)!r}, '--worker']))"
    )
    workers = workers.model_copy(update={"command": ("-c", code)})
    job = submit(make_plan(run_dir, [preflight(run_dir, 3), head, workers], nodes=3, kind="slurm"))
    assert wait_for_end(job, patience.TRAINING) == "FAILED"
    end = read_events(run_dir)[-1]
    assert (end.stage, end.data["cause"]) == ("ray-workers", "DEADLINE")
    assert "node03 (10.77.0.3)" in end.text
    four_nodes.assert_nothing_is_left(job, run_dir)
