"""Nodes that a run keeps: other runs start in them, requests are the owner's alone, and idle time ends the hold."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, preflight, stub
from vime.errors import BadInput, Cause
from vime.launch.hold import Hold, keeps
from vime.run.control import control_folder
from vime.run.folder import read_binding
from vime.run.hold import Holding, read_holding, request_run, take_request, write_holding
from vime.run.journal import Journal, read_events
from vime.run.variables import HELD
from vime.schedulers.runner_slurm import SlurmRunner
from vime.system.private import private_folder


def held_for(run: Path, minutes: float, *, meanwhile=lambda: None, nodes: int = 1) -> tuple[list[str], list[str]]:
    """Texts of a hold in journal and output; `meanwhile` runs in a thread once the nodes wait."""
    private_folder(run)
    private_folder(control_folder(run))
    plan = make_plan(run, [stub("train", "")], nodes=nodes, hold_minutes=minutes)
    said: list[str] = []

    def ask() -> None:
        while not (control_folder(run) / "holding.json").exists():
            time.sleep(0.05)
        meanwhile()

    thread = threading.Thread(target=ask)
    thread.start()
    Hold(plan, end_time=lambda: None, say=said.append).keep()
    thread.join(patience.MOMENT)
    assert not (control_folder(run) / "holding.json").exists()
    return [event.text for event in read_events(run) if event.kind == "hold"], said


def test_another_run_starts_in_the_nodes_and_its_time_is_not_idle(tmp_path):
    other = tmp_path / "other"
    private_folder(other)
    make_plan(other, [preflight(other, 1), stub("train", "print('here')")])
    texts, _ = held_for(tmp_path / "run", 0.1, meanwhile=lambda: request_run(tmp_path / "run", other))
    assert texts[:3] == ["1 nodes are kept for 0.1 min", "other starts in these nodes", "other ended: success"]
    assert texts[3].startswith("the hold ends after ")
    end = read_events(tmp_path / "run")[-1]
    assert end.data["runs"] == 1
    assert 5.5 < end.data["idle_s"] < 60
    assert read_events(other)[-1].data["cause"] == "SUCCESS"
    assert read_binding(other).nodes
    assert "here" in next((other / "logs" / "train").glob("node*.log")).read_text()


def test_a_run_that_fails_does_not_end_the_hold(tmp_path):
    other = tmp_path / "other"
    private_folder(other)
    make_plan(other, [stub("train", "raise SystemExit(3)")])
    texts, _ = held_for(tmp_path / "run", 0.05, meanwhile=lambda: request_run(tmp_path / "run", other))
    assert texts[2].startswith("other ended: ")
    assert "success" not in texts[2]
    assert texts[-1].startswith("the hold ends after ")


def test_a_signal_ends_the_hold(tmp_path):
    began = time.monotonic()
    texts, _ = held_for(tmp_path / "run", 30, meanwhile=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert time.monotonic() - began < patience.PROCESS
    assert len(texts) == 2


def test_every_signal_reaches_the_run_in_the_nodes(tmp_path):
    """A warning makes the run save a checkpoint, which may take an hour; the TERM after it must not wait for that."""
    other = tmp_path / "other"
    private_folder(other)
    never = stub("train", "import time; time.sleep(3600)", deadline_s=patience.TRAINING)
    make_plan(other, [preflight(other, 1), never])

    def warn_then_end() -> None:
        request_run(tmp_path / "run", other)
        wait_for_event(other, "stage-start", "train")
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_for_event(other, "checkpoint-request", "train")
        os.kill(os.getpid(), signal.SIGTERM)

    texts, _ = held_for(tmp_path / "run", 30, meanwhile=warn_then_end)
    assert texts[-1].startswith("the hold ends after ")
    signals = [event.text.split()[0] for event in read_events(other) if event.kind == "signal"]
    assert signals[0] == "SIGUSR2"
    assert read_events(other)[-1].kind == "run-end"


def wait_for_event(run: Path, kind: str, stage: str) -> None:
    deadline = time.monotonic() + patience.PROCESS
    while not any(event.kind == kind and event.stage == stage for event in read_events(run)):
        assert time.monotonic() < deadline, f"no {kind} of {stage}"
        time.sleep(0.05)


def test_a_request_that_others_can_write_is_not_run(tmp_path):
    run = tmp_path / "run"

    def ask() -> None:
        request_run(run, tmp_path / "other")
        (path,) = control_folder(run).glob("next-*.json")
        path.chmod(0o666)

    private_folder(run)
    private_folder(control_folder(run))
    ask()
    with pytest.raises(BadInput, match="can be read or written by others"):
        take_request(run)
    assert not list(control_folder(run).glob("next-*.json"))
    (control_folder(run) / "next-1.json").touch(mode=0o600)
    with pytest.raises(BadInput, match="is no request"):
        take_request(run)
    assert take_request(run) is None


def test_more_nodes_than_are_held_are_refused_and_the_hold_goes_on(tmp_path):
    other = tmp_path / "other"
    private_folder(other)
    make_plan(other, [stub("train", "")], nodes=2)
    texts, said = held_for(tmp_path / "run", 0.03, meanwhile=lambda: request_run(tmp_path / "run", other))
    assert len(texts) == 2
    assert any(f"{other} takes more nodes than the 1 that are held" in line for line in said)


def test_requests_are_taken_in_their_order(tmp_path):
    private_folder(control_folder(tmp_path))
    for name in ("a", "b"):
        request_run(tmp_path, name)
    assert [take_request(tmp_path) for _ in range(3)] == ["a", "b", None]


def test_what_is_held_is_known_while_it_is_held(tmp_path):
    with pytest.raises(BadInput, match="holds no nodes now"):
        read_holding(tmp_path)
    write_holding(tmp_path, Holding(4, time.time() + 60))
    assert read_holding(tmp_path).nodes == 4
    write_holding(tmp_path, Holding(4, time.time() - 1))
    with pytest.raises(BadInput, match="holds no nodes now"):
        read_holding(tmp_path)


@pytest.mark.parametrize(
    ("cause", "requeued", "stays"),
    [(Cause.SUCCESS, False, True), (Cause.CODE_ERROR, False, True), (Cause.CANCELLED, False, False),
     (Cause.NODE_FAILURE, True, False)],
)  # fmt: skip
def test_nodes_stay_unless_the_run_was_cancelled_or_starts_again(tmp_path, cause, requeued, stays):
    plan = make_plan(tmp_path, [stub("train", "")], hold_minutes=5)
    journal = Journal(tmp_path)
    journal.write("run-start", "")
    journal.write("run-end", "", data={"cause": cause.name, "requeued": requeued})
    journal.close()
    assert keeps(plan, cause) is stays
    assert not keeps(plan.model_copy(update={"hold_minutes": 0}), cause)


def test_a_run_in_held_nodes_does_not_requeue_their_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    plan = make_plan(tmp_path, [stub("train", "")], kind="slurm")
    assert SlurmRunner(plan).can_requeue
    monkeypatch.setenv(HELD, "1")
    assert not SlurmRunner(plan).can_requeue
