"""Lost nodes of a real training whose allocation has spares: the run goes on in the same start of the job."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.support import patience
from tests.support.slurm_cluster import DevCluster, bring_up, wait_for_event
from tests.support.slurm_scene import node_name
from tests.support.slurm_training import ENGINE_NODE, NODES, RANK_NODE, Training
from vime.run.folder import read_binding, task_log
from vime.run.metrics import read_metrics
from vime.slurm import queue as slurm

pytestmark = pytest.mark.e2e

SPARES = 4
SLURMD_TIMEOUT = 300
"""Slurm's default."""


@pytest.fixture(scope="module")
def cluster(cluster_before: None) -> DevCluster:
    return bring_up(NODES + SPARES, SLURMD_TIMEOUT)


@pytest.fixture(scope="module")
def run(cluster: DevCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    training = Training(cluster, tmp_path_factory.mktemp("base"), SPARES)
    yield training
    training.close()
    # What a lost node left goes when the next run's preflight comes there.
    for node in range(NODES + SPARES):
        training.on_node(node, sys.executable, "-c", "from vime.node.scratch import remove_dead; remove_dead()")
    training.nothing_is_left()


def lose(run: Training, *nodes: int) -> None:
    """The nodes are lost until the scene closes."""
    for node in nodes:
        run.fault("node-kill", node, mend="node-start")


def is_recovered(run: Training, saved: int, lost: set[int]) -> None:
    """The run trains on from its checkpoint, on other nodes, in the job's first start, and counts nothing twice."""
    run.trains_from(saved + 1)
    hosts = {node.host for node in read_binding(run.run_dir).nodes}
    assert not hosts & {node_name(node) for node in lost}
    state = slurm.job_state(run.job)
    assert state is not None
    assert (state.state, state.restarts) == ("RUNNING", 0)
    rows = read_metrics(run.run_dir)
    assert sorted(rows) == list(range(len(rows)))


def test_a_spare_takes_the_place_of_a_ranks_node(run: Training) -> None:
    before = run.under_way()
    lost = run.node_of(RANK_NODE)
    lose(run, lost)
    run.ended("NODE_FAILURE", before=before, node=lost, within_s=patience.SLURM, text="recovery on the 6 nodes left")
    is_recovered(run, run.saved(), {lost})
    recovery = next(event for event in reversed(run.events()) if event.kind == "recovery")
    assert recovery.data["kept"]
    services = [event.stage for event in run.events() if event.kind == "stage-ready" and event.time > recovery.time]
    assert services == ["ray-workers"]
    assert "engines found running: 0" in task_log(run.run_dir, "train", 0, 0, 1).read_text()


@pytest.mark.full
def test_two_nodes_at_once_and_one_during_the_recovery(run: Training) -> None:
    before = run.under_way()
    bindings = sum(event.kind == "binding" for event in run.events())
    first, second = run.node_of(RANK_NODE), run.node_of(ENGINE_NODE)
    lose(run, first, second)
    wait_for_event(run.run_dir, "run-end", patience.SLURM, count=before + 1)
    wait_for_event(run.run_dir, "binding", patience.JOB, count=bindings + 1)
    third = run.node_of(ENGINE_NODE)
    saved = run.saved()
    lose(run, third)
    wait_for_event(run.run_dir, "run-end", patience.JOB, count=before + 2)
    is_recovered(run, saved, {first, second, third})
