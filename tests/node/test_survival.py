"""A run's knowledge of its earlier starts, when it saves before its end, and its last word when disks or Slurm fail."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch_stub import make_plan, stub
from vime.errors import Cause
from vime.launch import controller, lead, restarts
from vime.launch.controller import Controller
from vime.launch.witness import tell_of_death
from vime.run import history
from vime.run import journal as events
from vime.run.journal import Event, Journal, read_events
from vime.run.plan import Plan
from vime.schedulers.runner_local import LocalRunner
from vime.schedulers.runner_slurm import SlurmRunner
from vime.slurm import queue as slurm
from vime.slurm.queue import SlurmError


def failed(node: str, cause: Cause = Cause.NODE_FAILURE) -> Event:
    return Event(kind="run-end", node=node, data={"cause": cause.name})


def test_a_node_that_failed_twice_is_known() -> None:
    told = [failed("node02"), failed("node03"), failed("node02"), failed("node03", Cause.CODE_ERROR)]
    assert history.failed_too_often(history.node_failures(told)) == ["node02"]


def test_a_start_without_a_last_word_is_found() -> None:
    start = Event(kind="run-start", data={"restart": 0})
    assert history.unfinished_start([start, Event(kind="stage-start", stage="train")]) == start
    assert history.unfinished_start([start, failed("node02")]) is None
    assert history.unfinished_start([]) is None


class Allocation(LocalRunner):
    """One machine that Slurm seems to give and to take."""

    def __init__(self, plan: Plan, **settings: Any) -> None:
        super().__init__(plan)
        self.can_requeue = True
        self.lost: Cause = settings.get("lost", Cause.CODE_ERROR)
        self.refusals = settings.get("refusals", 0)
        self.end: float | None = settings.get("end")
        self.said: list[str] = []
        self.excluded: list[str] = []

    def end_time(self) -> float | None:
        return self.end

    def why_lost(self, job: str, restart: int) -> Cause:
        return self.lost

    def requeue(self) -> None:
        self.refusals -= 1
        if self.refusals >= 0:
            raise SlurmError("Unable to contact slurm controller")

    def exclude(self, nodes: Any) -> None:
        self.excluded += nodes

    def show(self, text: str) -> None:
        self.said.append(text)


def run(plan: Plan, runner: Allocation) -> Cause:
    return Controller(plan, runner, say=lambda line: None).run()


def test_the_next_start_tells_how_one_without_a_last_word_ended(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("cast", "pass")])
    journal = Journal(run_dir)
    journal.write("run-start", data={"host": "node01", "job": "7", "restart": 0})
    journal.write("stage-start", stage="train")
    assert run(plan, Allocation(plan, lost=Cause.NODE_FAILURE)) is Cause.SUCCESS
    end = next(event for event in read_events(run_dir) if event.kind == "run-end")
    assert (end.data["cause"], end.node, end.stage) == ("NODE_FAILURE", "node01", "train")
    assert "start 0 of job 7 left no last word: node failure of node01" in end.text
    assert read_events(run_dir)[-1].data["cause"] == "SUCCESS"


def test_the_witness_ends_the_journal_of_a_dead_controller_and_of_no_other(run_dir: Path) -> None:
    make_plan(run_dir, [stub("cast", "pass")])
    journal = Journal(run_dir)
    journal.write("run-start", data={"pid": 4242})
    journal.write("stage-start", stage="ray-head")
    journal.write("stage-start", stage="train")
    tell_of_death(str(run_dir), 4343)
    assert read_events(run_dir)[-1].kind == "stage-start"
    tell_of_death(str(run_dir), 4242)
    end = read_events(run_dir)[-1]
    assert (end.kind, end.stage, end.data["cause"]) == ("run-end", "train", "CODE_ERROR")
    tell_of_death(str(run_dir), 4242)
    assert [event.kind for event in read_events(run_dir)].count("run-end") == 1


def test_a_requeue_insists_while_slurms_controller_is_away(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("cast", "import sys; sys.exit(12)")])
    runner = Allocation(plan, refusals=2)
    assert run(plan, runner) is Cause.NODE_FAILURE
    assert read_events(run_dir)[-1].data["requeued"] is True
    assert runner.refusals == -1


def test_a_requeue_that_slurm_refuses_for_good_is_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "REQUEUE_PATIENCE_S", 0.0)
    plan = make_plan(run_dir, [stub("cast", "import sys; sys.exit(12)")])
    assert run(plan, Allocation(plan, refusals=1000)) is Cause.NODE_FAILURE
    assert read_events(run_dir)[-1].data["requeued"] is False


def test_the_second_failure_of_a_node_excludes_it(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("cast", "import sys; sys.exit(12)")])
    runner = Allocation(plan)
    run(plan, runner)
    assert runner.excluded == []
    run(plan, runner)
    assert runner.excluded == [os.uname().nodename]
    assert "exclude" in [event.kind for event in read_events(run_dir)]


# -- disks --


def full(monkeypatch: pytest.MonkeyPatch, number: int, *, while_there: Path | None = None) -> None:
    """Writing raises this error: to the journal alone, for as long as a file is there."""
    write = os.write

    def refuse(descriptor: int, data: bytes) -> int:
        is_journal = os.readlink(f"/proc/self/fd/{descriptor}").endswith(events.EVENTS_FILE)
        if is_journal and (while_there is None or while_there.exists()):
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)


def test_on_a_full_disk_the_journal_takes_up_its_reserve(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir.mkdir()
    journal = Journal(run_dir)
    full(monkeypatch, errno.ENOSPC, while_there=run_dir / events.RESERVE_FILE)
    journal.write("run-end", "no space")
    assert read_events(run_dir)[-1].text == "no space"
    assert journal.error is None


def test_events_wait_while_the_journal_cannot_be_written(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir.mkdir()
    switch = run_dir / "read-only"
    journal = Journal(run_dir)
    switch.touch()
    full(monkeypatch, errno.EROFS, while_there=switch)
    journal.write("stage-start", stage="train")
    journal.write("run-end", "the end")
    assert read_events(run_dir) == []
    switch.unlink()
    assert journal.flush()
    assert [event.kind for event in read_events(run_dir)] == ["stage-start", "run-end"]


def test_a_last_word_that_cannot_be_written_stands_in_the_queue(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "JOURNAL_PATIENCE_S", 0.0)
    plan = make_plan(run_dir, [stub("cast", "raise OSError(30, 'Read-only file system')")])
    runner = Allocation(plan)
    full(monkeypatch, errno.EROFS)
    assert run(plan, runner) is Cause.STORAGE
    assert runner.said[-1].startswith("vime: STORAGE: cast failed on")
    assert "Read-only file system" in runner.said[-1]


def test_a_run_folder_that_takes_no_journal_is_told(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("cast", "pass")])
    (run_dir / "logs").write_text("not a folder")
    runner = Allocation(plan)
    assert run(plan, runner) is Cause.BAD_INPUT
    assert "logs" in runner.said[-1]


# -- the end of the allocation --


STEP = {"perf/generate_time": 100.0, "perf/train_time": 50.0, "perf/sync_time": 10.0}


def test_the_lead_comes_from_the_slowest_rollout_and_the_slowest_save() -> None:
    slow = {**STEP, "perf/train_time": 90.0}
    steps = {0: slow, 1: {**STEP, "perf/save_time": 40.0}, 2: {**STEP, "perf/save_time": 20.0}}
    assert lead.measured_lead_s(steps) == 200 + 1.5 * 40 + lead.MARGIN_S
    assert lead.measured_lead_s({0: slow}) is None


def test_what_was_long_ago_does_not_count() -> None:
    steps = {0: {**STEP, "perf/generate_time": 9000.0}}
    steps |= {n: {**STEP, "perf/save_time": 40.0} for n in range(1, 30)}
    assert lead.measured_lead_s(steps) == 160 + 60 + lead.MARGIN_S


def measured(plan: Plan, save_s: float) -> None:
    values = {"step": 0, **STEP, "perf/save_time": save_s}
    Path(plan.run_dir, "metrics.jsonl").write_text(str(values).replace("'", '"') + "\n")


@pytest.mark.parametrize(
    ("left_s", "save_s", "due"),
    [(120, None, False), (80, None, True), (350, 100, True), (450, 100, False), (500, 1e6, True), (700, 1e6, False)],
)
def test_training_is_asked_to_save_when_the_lead_has_come(
    run_dir: Path, left_s: float, save_s: float | None, due: bool
) -> None:
    """The plan's lead is 100 s; with saves of 100 s it is 160 + 150 + 60; never more than half of the 20 minutes."""
    plan = make_plan(run_dir, [stub("train", "pass")], signal_lead_s=100, cluster={"time_limit_minutes": 20})
    if save_s is not None:
        measured(plan, save_s)
    runner = Allocation(plan, end=time.time() + left_s)
    assert lead.TimeLeft(plan, runner).is_due() is due


def test_the_end_that_was_known_holds_while_slurm_does_not_answer(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "pass")])
    runner = Allocation(plan, end=time.time() + 500)
    left = lead.TimeLeft(plan, runner)
    left.look()
    runner.end = None
    assert 400 < left.look() < 500


def test_without_an_end_nothing_is_due(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "pass")])
    left = lead.TimeLeft(plan, Allocation(plan))
    assert not left.is_due()
    assert not left.ends_soon()


@pytest.mark.parametrize(("state", "taken"), [("COMPLETING", True), ("PENDING", True), ("RUNNING", False)])
def test_a_requeue_whose_caller_slurm_ended_counts_where_the_job_has_left(
    state: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's first act after it takes the request is to end this start, `scontrol` with it."""

    def ended(job: str) -> None:
        raise SlurmError(f"scontrol requeue {job} exited with -15: no message")

    monkeypatch.setattr(slurm, "requeue", ended)
    monkeypatch.setattr(slurm, "job_state", lambda job: slurm.JobState(job, state))
    runner = SlurmRunner.__new__(SlurmRunner)
    runner.job = "7"
    if taken:
        runner.requeue()
    else:
        with pytest.raises(SlurmError, match="exited with -15"):
            runner.requeue()
