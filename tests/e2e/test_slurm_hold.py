"""A run that keeps its nodes under a real Slurm: another one starts in the same job, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, preflight, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event, wait_until
from vime.run.hold import read_holding, request_run
from vime.run.journal import read_events
from vime.schedulers.submission import submit_jobs

pytestmark = pytest.mark.e2e


def test_another_run_starts_in_the_job_and_idle_nodes_are_given_back(four_nodes: DevCluster, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    plan = make_plan(
        first, [preflight(first, 2), stub("train", "", nodes=(0, 1))], nodes=2, kind="slurm", hold_minutes=0.5
    )
    (job,) = submit_jobs(plan)
    wait_for_event(first, "run-end", patience.SLURM)
    wait_for_event(first, "hold", patience.NOTICE)
    assert read_holding(first).nodes == 2
    make_plan(second, [preflight(second, 2), stub("train", "", nodes=(0, 1))], nodes=2, kind="slurm")
    asked = time.monotonic()
    request_run(first, second)
    start = wait_for_event(second, "run-start", patience.SLURM)
    assert time.monotonic() - asked < patience.NOTICE
    assert start.data["job"] == job.job_id
    wait_until(lambda: read_events(second)[-1].data.get("cause") == "SUCCESS", patience.JOB)
    assert wait_for_end(job.job_id, patience.JOB) == "COMPLETED"
    assert read_events(first)[-1].data["runs"] == 1
