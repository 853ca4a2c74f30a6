"""Every fault of docs/faults.md that can meet a training, met by a real one, with Slurm's own SlurmdTimeout.

Each ends in time, with the right cause and culprit, and resumes from its newest checkpoint where another start helps.
`tools/test.sh` runs four of them, `--full` all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.support import patience
from tests.support.slurm_cluster import DevCluster, bring_up, wait_until
from tests.support.slurm_training import DRIVER_NODE, ENGINE_NODE, NODES, RANK_NODE, Training
from vime.run.metrics import read_metrics
from vime.slurm import queue as slurm

pytestmark = pytest.mark.e2e

SLURMD_TIMEOUT = 300
"""Slurm's default."""
MORE = 3
"""Nodes of the cluster that the job does not need: one that failed twice is left out from then on."""


@pytest.fixture(scope="module")
def cluster(cluster_before: None) -> DevCluster:
    return bring_up(NODES + MORE, SLURMD_TIMEOUT)


@pytest.fixture(scope="module")
def run(cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    training = Training(cluster, tmp_path_factory.mktemp("base"))
    yield training
    training.close()
    training.nothing_is_left()


def engine_restarts(run: Training) -> float:
    return sum(values.get("sync/engine_restarts", 0.0) for values in read_metrics(run.run_dir).values())


def loses(run: Training, *words: str) -> None:
    """The engine loses its process of these words and comes back, and the run does not end."""
    before, restarts = run.under_way(), engine_restarts(run)
    run.signal(run.node_of(ENGINE_NODE), "KILL", *words)
    run.under_way()
    assert run.ends_so_far() == before
    assert engine_restarts(run) > restarts


def test_an_engine_is_killed_and_comes_back(run: Training) -> None:
    loses(run, "vime.rollout.serve")


def test_a_rank_is_killed(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(RANK_NODE)
    run.on_node(node, "kill", "-9", run.rank_process(node))
    end = run.ended("CRASH", before=before, node=node, rank=1, within_s=patience.SLURM, text="rank 1 died")
    assert "error: training ended: crash: rank 1 died" in end.data["log_tail"]
    run.resumes()


def test_the_node_of_a_rank_is_lost(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(RANK_NODE)
    run.fault("node-kill", node, mend="node-start")
    run.ended("NODE_FAILURE", before=before, node=node, within_s=patience.SLURM)
    run.resumes()


def test_the_time_limit_comes(run: Training) -> None:
    before = run.under_way()
    state = slurm.job_state(run.job)
    assert state is not None
    assert state.start is not None
    minutes = int(time.time() - state.start) // 60 + 3
    slurm.call("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    run.ended("TIME_LIMIT", before=before, within_s=patience.JOB, text="with checkpoint")
    slurm.call("scontrol", "update", f"JobId={run.job}", "TimeLimit=7-0")
    run.resumes()


@pytest.mark.full
def test_a_worker_of_an_engine_is_killed_and_the_engine_comes_back(run: Training) -> None:
    """The process that holds the model: the one with the GPU, where there are GPUs."""
    loses(run, "VLLM::Worker")


@pytest.mark.full
def test_the_node_of_an_engine_is_lost(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(ENGINE_NODE)
    run.fault("node-kill", node, mend="node-start")
    run.ended("NODE_FAILURE", before=before, node=node, within_s=patience.SLURM)
    run.resumes()


@pytest.mark.full
def test_the_node_of_the_driver_is_lost(run: Training) -> None:
    """The controller dies with it: Slurm notices after its timeout, and the next start writes the last word."""
    before = run.under_way()
    node = run.node_of(DRIVER_NODE)
    run.fault("node-kill", node, mend="node-start")
    wait_until(run.waits, SLURMD_TIMEOUT + patience.JOB)
    saved = run.saved()
    run.mend()
    run.ended("NODE_FAILURE", before=before, node=node, within_s=patience.JOB, text="no last word")
    run.resumes(saved)


@pytest.mark.full
def test_the_job_is_preempted(run: Training) -> None:
    before = run.under_way()
    slurm.call("scontrol", "requeue", run.job)
    run.ended("PREEMPTED", before=before, within_s=patience.NOTICE)
    run.resumes()


@pytest.mark.full
def test_a_raylet_is_killed(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(ENGINE_NODE)
    run.kill(node, "raylet")
    run.ended("CRASH", before=before, stage="ray-workers", node=node, within_s=patience.SLURM, text="raylet")
    run.resumes()


@pytest.mark.full
def test_the_head_of_ray_is_killed(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(DRIVER_NODE)
    run.kill(node, "gcs_server")
    run.ended("CRASH", before=before, stage="ray-head", node=node, within_s=patience.SLURM, text="gcs_server")
    run.resumes()


@pytest.mark.full
def test_the_driver_is_killed(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(DRIVER_NODE)
    run.signal(node, "KILL", "-m vime.train")
    run.ended("CRASH", before=before, node=node, within_s=patience.NOTICE, text="SIGKILL")
    run.resumes()


@pytest.mark.full
def test_the_link_of_a_node_is_cut(run: Training) -> None:
    before = run.under_way()
    node = run.node_of(ENGINE_NODE)
    run.fault("link-down", node, mend="link-up")
    run.ended("NODE_FAILURE", before=before, node=node, within_s=patience.JOB)
    run.resumes()


@pytest.mark.full
def test_slurmd_of_a_node_is_killed(run: Training) -> None:
    """Training goes on until Slurm gives the node up."""
    before, saved = run.under_way(), run.saved()
    node = run.node_of(RANK_NODE)
    run.fault("slurmd-kill", node, mend="slurmd-start")
    run.ended("NODE_FAILURE", before=before, node=node, within_s=SLURMD_TIMEOUT + patience.JOB)
    assert run.saved() > saved
