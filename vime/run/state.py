"""State of a run for `vime.status`, from its folder and, if any, its scheduler."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vime.errors import SchedulerError
from vime.run.evaluations import left_out
from vime.run.folder import BINDING, read_binding, read_plan
from vime.run.hold import find_holding
from vime.run.jobs import Job, read_jobs
from vime.run.journal import Event, last_start, read_events
from vime.run.metrics import read_metrics
from vime.run.plan import Plan
from vime.run.scheduler import JobState, Scheduler, find_scheduler
from vime.system.json_lines import damage_note
from vime.system.processes import start_ticks

ENDED = ("succeeded", "failed", "cancelled", "lost")
_PATIENCE_S = 10.0
"""Deadline of a query to the scheduler, in seconds; without an answer the journal decides."""

_AFTER = {"stage-start": "running", "stage-ready": "ready", "stage-skip": "skipped", "stage-end": "done"}


@dataclass
class StageState:
    """One stage of the plan in this start of the run."""

    name: str
    state: str = "waiting"
    """`waiting`, `running`, `ready` (a service), `done`, `skipped`, `failed`, `stopped`."""
    seconds: float | None = None


@dataclass
class JobOfRun:
    """One job of the run."""

    job_id: str
    link: str | None
    """Link of the chain; None if the run is one job."""
    state: str
    """State in the scheduler's words; empty if it no longer knows the job."""
    reason: str = ""


@dataclass
class RunState:
    """All values shown by `vime.status`; `--json` prints them unchanged."""

    run: str
    run_dir: str
    state: str
    """`submitted`, `pending`, `running`, `requeued`, `succeeded`, `failed`, `lost`, or `planned`."""
    job: str | None = None
    """Id of the job that runs or comes next."""
    jobs: list[JobOfRun] = field(default_factory=list)
    """All jobs of a chain."""
    reason: str = ""
    """Reason for which the job waits, or the end of the run."""
    cause: str | None = None
    restart: int = 0
    stage: str | None = None
    stages: list[StageState] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    rollout: int | None = None
    """Number of finished rollouts."""
    num_rollout: int = 0
    reward: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last rollout, by name."""
    seconds_left: float | None = None
    """Seconds until the allocation ends."""
    next_checkpoint: int | None = None
    """Number of the rollout after which the next checkpoint is written."""
    expected_start: float | None = None
    """Unix time at which the scheduler expects a waiting job to start."""

    note: str = ""
    """Facts that could not be determined, each with the reason."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_state(run_dir: str | os.PathLike[str]) -> RunState:
    """Read the state of a run; from its folder alone if the scheduler is silent. Raises BadInput without a plan."""
    plan = read_plan(run_dir)
    jobs = read_jobs(run_dir)
    whole = read_events(run_dir, damage := Counter())
    events = of_jobs(last_start(whole), jobs)
    now = current_job(jobs, events)
    found = RunState(run=plan.run_name, run_dir=plan.run_dir, state="planned", job=now.job_id if now else None)
    found.num_rollout = plan.recipe.rollout.num_rollout
    _read_events(found, plan, events)
    job = None
    try:
        if now is not None and _last_word(events) is None:
            scheduler = find_scheduler(plan.cluster.kind)
            job = scheduler.job(now.job_id, timeout_s=_PATIENCE_S)
            found.jobs = [_job_of_run(scheduler, other, now, job) for other in jobs] if len(jobs) > 1 else []
    except SchedulerError as error:
        found.note = str(error)
    _judge(found, events, job)
    _read_metrics(found, plan, damage)
    missing = ", ".join(map(str, left_out(run_dir, whole)))
    notes = [found.note, damage_note(damage)]
    notes.append(f"evaluations left out: rollout {missing} (vime.report says why)" if missing else "")
    if (held := find_holding(run_dir)) is not None:
        clock = time.strftime("%H:%M:%S", time.localtime(held.until))
        notes.append(f"its {held.nodes} nodes wait for another run until {clock} (vime.submit --in)")
    found.note = "; ".join(note for note in notes if note)
    return found


def of_jobs(events: list[Event], jobs: Sequence[Job]) -> list[Event]:
    """Events without those of an earlier submission: a resubmitted run has none until it starts."""
    ids = {job.job_id for job in jobs}
    kept, ours = [], True
    for event in events:
        if event.kind == "run-start":
            ours = not ids or event.data.get("job") in ids
        if ours:
            kept.append(event)
    return kept


def current_job(jobs: Sequence[Job], events: list[Event]) -> Job | None:
    """Job that runs or comes next: in a chain, the first that is not done in the journal, else the last.

    `events` are those since the last start.
    """
    done = 0
    for event in events:
        if event.kind == "run-start":
            done = event.data.get("link_index", 0)
        elif event.kind == "job-end":
            done += 1
    return jobs[min(done, len(jobs) - 1)] if jobs else None


def _job_of_run(scheduler: Scheduler, job: Job, now: Job, state: JobState | None) -> JobOfRun:
    if job != now:
        state = scheduler.job(job.job_id, timeout_s=_PATIENCE_S)
    return JobOfRun(job.job_id, job.link, state.state if state else "", state.reason if state else "")


def _last_word(events: list[Event]) -> Event | None:
    """Final event of the run; None while it runs or after a requeue."""
    end = next((event for event in reversed(events) if event.kind == "run-end"), None)
    return None if end is None or end.data.get("requeued") else end


def _read_events(found: RunState, plan: Plan, events: list[Event]) -> None:
    stages = {stage.name: StageState(stage.name) for stage in plan.stages}
    started: dict[str, float] = {}
    for event in events:
        if event.kind == "run-start":
            found.restart = event.data.get("restart", 0)
        elif event.kind == "binding":
            found.hosts = list(event.data.get("hosts", {}).values())
        stage = stages.get(event.stage or "")
        if stage is None:
            continue
        new = _AFTER.get(event.kind)
        if event.kind == "stage-start":
            started[stage.name], found.stage = event.time, stage.name
        if new == "done" and event.text == "stopped":
            new = "stopped"
        stage.state = new or stage.state
        stage.seconds = event.data.get("seconds", stage.seconds)
        if event.kind == "run-end":
            stage.state = "failed"
    for name, begin in started.items():
        if stages[name].state == "running":
            stages[name].seconds = round(time.time() - begin, 1)
    found.stages = list(stages.values())


def _judge(found: RunState, events: list[Event], job: JobState | None) -> None:
    """Judge by the run's final event; without one, by the scheduler's state or the controller's process."""
    end = _last_word(events)
    begun = bool(events) and events[-1].kind != "job-end"
    if end is not None:
        found.cause, found.reason = end.data.get("cause"), end.text
        found.state = {"SUCCESS": "succeeded", "CANCELLED": "cancelled"}.get(found.cause or "", "failed")
    elif job is not None and job.phase == "waiting":
        found.state = "requeued" if begun else "pending"
        found.reason, found.expected_start = job.reason, job.start
    elif job is not None and job.phase == "running":
        found.state, found.seconds_left = "running", _seconds_left(job.end)
    elif job is not None and not begun and job.state == "COMPLETED":
        # In a hand-submitted chain a job is known only once it starts.
        found.state, found.reason = "pending", "the next job of the chain has not started"
    elif job is not None and not begun:
        found.state = "cancelled" if job.state.startswith("CANCELLED") else "failed"
        found.reason = f"the job is {job.state}, and it never started"
    elif job is not None:
        found.state, found.reason = "lost", f"the job is {job.state} and its controller left no last word"
    elif found.note:
        _judge_by_journal(found, events)
    elif found.job is not None and events:
        found.state, found.reason = "lost", "the scheduler does not know the job, and its controller left no last word"
    elif events:
        alive = controller_is_here(events)
        found.state = "running" if alive else "lost"
        found.reason = "" if alive else "the journal has no end, and the controller does not run on this machine"
    elif found.job is not None:
        found.state, found.reason = "submitted", "the scheduler does not know the job, and it has not started"


def _judge_by_journal(found: RunState, events: list[Event]) -> None:
    """Judge by the journal's last event, if the scheduler does not answer."""
    if not events:
        found.state = "submitted"
        return
    last = events[-1]
    found.state = {"job-end": "pending", "run-end": "requeued"}.get(last.kind, "running")
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last.time))
    found.reason = f"as its journal tells, last at {clock}"
    if found.state == "running" and (Path(found.run_dir) / BINDING).exists():
        found.seconds_left = _seconds_left(read_binding(found.run_dir).end_time)


def _seconds_left(end: float | None) -> float | None:
    return None if end is None else max(0.0, round(end - time.time()))


def controller_is_here(events: list[Event]) -> int | None:
    """Pid of the run's controller if it runs on this machine, else None."""
    start = next((event for event in reversed(events) if event.kind == "run-start"), None)
    if start is None or start.data.get("host") != socket.gethostname():
        return None
    pid = int(start.data["pid"])
    return pid if start_ticks(pid) == start.data.get("pid_start") else None


def _read_metrics(found: RunState, plan: Plan, damage: Counter[str]) -> None:
    steps = read_metrics(Path(plan.run_dir), damage)
    trained = [step for step, values in steps.items() if "rollout/raw_reward" in values]
    if not trained:
        return
    last = trained[-1]
    found.rollout = last + 1
    found.metrics = steps[last]
    found.reward = steps[last]["rollout/raw_reward"]
    interval = plan.recipe.checkpoint.save_interval
    final = found.num_rollout - 1
    if last < final:
        if isinstance(interval, int):
            found.next_checkpoint = min((last + 1) // interval * interval + interval - 1, final)
        elif interval is None:
            found.next_checkpoint = final
