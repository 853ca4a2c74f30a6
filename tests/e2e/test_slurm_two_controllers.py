"""Two jobs of a real Slurm that run the same run folder: the second is refused and touches nothing of the first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, preflight, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event, wait_until
from vime.run.journal import read_events
from vime.run.owner import read_owner
from vime.run.plan import Plan
from vime.schedulers.submission import submit
from vime.slurm import queue as slurm

pytestmark = pytest.mark.e2e

TRAINING = "print('training', flush=True); import time; time.sleep(900)"


@pytest.fixture
def plan(four_nodes: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plan]:
    """A run on two of the four nodes, so that a second job of it has nodes of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run_dir = tmp_path / "run"
    yield make_plan(
        run_dir, [preflight(run_dir, 2), stub("train", TRAINING, deadline_s=patience.LEARNING)], nodes=2, kind="slurm"
    )
    for job in slurm.call("squeue", "-h", "-o", "%i").split():
        slurm.cancel(job)


def content(run_dir: Path) -> dict[str, bytes]:
    """Files that a controller writes: journal, binding, owner and secrets."""
    files = [run_dir / name for name in ("events.jsonl", "binding.json", "owner.json", "preflight.json")]
    return {str(path): path.read_bytes() for path in (*files, *sorted((run_dir / "secrets").iterdir()))}


def trains(run_dir: Path, count: int) -> None:
    def on() -> bool:
        events = read_events(run_dir) if (run_dir / "events.jsonl").exists() else []
        return sum(event.kind == "stage-start" and event.stage == "train" for event in events) >= count

    wait_until(on, patience.JOB, lambda: str(read_events(run_dir)[-3:]))


def test_the_second_job_is_refused_and_the_first_goes_on(plan: Plan) -> None:
    run_dir = Path(plan.run_dir)
    first = submit(plan)
    trains(run_dir, 1)
    before = content(run_dir)
    owner = read_owner(run_dir)
    assert owner is not None
    assert owner.job == first

    second = submit(plan)
    assert wait_for_end(second, patience.JOB) == "FAILED"
    told = [path for path in run_dir.rglob("*") if path.is_file() and second in path.name]
    text = "".join(path.read_text(errors="replace") for path in told)
    assert f"is in use by start 0 of job {first}" in text, told
    assert content(run_dir) == before
    state = slurm.job_state(first)
    assert state is not None
    assert state.state == "RUNNING"

    slurm.cancel(first)
    wait_for_event(run_dir, "run-end", patience.SLURM)
    wait_until(lambda: not slurm.call("squeue", "-h", "-j", first).strip(), patience.JOB)
    third = submit(plan)
    trains(run_dir, 2)
    owner = read_owner(run_dir)
    assert owner is not None
    assert owner.job == third
