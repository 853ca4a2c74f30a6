"""What a run is doing, from its folder and, where there is one, Slurm: what `vime.status` shows."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vime.launch import slurm
from vime.launch.events import Event, last_start, read_events
from vime.launch.submit import read_job
from vime.launch.supervise import start_ticks
from vime.observe.metrics import read_metrics
from vime.planning.io import read_plan
from vime.planning.types import Plan

RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING")

_AFTER = {"stage-start": "running", "stage-ready": "ready", "stage-skip": "skipped", "stage-end": "done"}


@dataclass
class StageState:
    """One stage of the plan in this start of the run."""

    name: str
    state: str = "waiting"
    """`waiting`, `running`, `ready` (a service), `done`, `skipped`, `failed`, `stopped`."""
    seconds: float | None = None


@dataclass
class RunState:
    """Everything that `vime.status` shows; `--json` prints it as it is."""

    run: str
    run_dir: str
    state: str
    """`submitted`, `pending`, `running`, `requeued`, `succeeded`, `failed`, `lost`, or `planned`."""
    job: str | None = None
    reason: str = ""
    """Why the job waits, or how the run ended."""
    cause: str | None = None
    restart: int = 0
    stage: str | None = None
    stages: list[StageState] = field(default_factory=list)
    hosts: list[str] = field(default_factory=list)
    rollout: int | None = None
    """Rollouts finished."""
    num_rollout: int = 0
    reward: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last rollout."""
    seconds_left: float | None = None
    """Until the allocation ends."""
    next_checkpoint: int | None = None
    """Number of the rollout after which the next checkpoint is written."""
    expected_start: float | None = None
    """Unix time at which Slurm expects a waiting job to start."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_state(run_dir: str | os.PathLike[str]) -> RunState:
    """Reads the state of a run. Raises BadInput where the folder holds no plan."""
    plan = read_plan(run_dir)
    events = last_start(read_events(run_dir))
    job_id = read_job(run_dir)
    job = slurm.job_state(job_id) if job_id is not None and slurm.available() else None
    found = RunState(run=plan.run_name, run_dir=plan.run_dir, state="planned", job=job_id)
    found.num_rollout = plan.recipe.rollout.num_rollout
    _read_events(found, plan, events)
    _judge(found, events, job)
    _read_metrics(found, plan)
    return found


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


def _judge(found: RunState, events: list[Event], job: slurm.JobState | None) -> None:
    """The run's own last word counts; without one, what Slurm or the process table says of its controller."""
    end = next((event for event in reversed(events) if event.kind == "run-end"), None)
    if job is not None and job.end is not None and job.state in RUNNING:
        found.seconds_left = max(0.0, round(job.end - time.time()))
    if end is not None and not end.data.get("requeued"):
        found.cause, found.reason = end.data.get("cause"), end.text
        found.state = "succeeded" if found.cause == "SUCCESS" else "failed"
    elif job is not None and job.state in WAITING:
        found.state = "requeued" if events else "pending"
        found.reason, found.expected_start = job.reason, job.start
    elif job is not None and job.state in RUNNING:
        found.state = "running"
    elif job is not None:
        found.state, found.reason = "lost", f"the job is {job.state} and its controller left no last word"
    elif events:
        alive = controller_is_here(events)
        found.state = "running" if alive else "lost"
        found.reason = "" if alive else "the journal has no end, and the controller does not run on this machine"
    elif found.job is not None:
        found.state, found.reason = "submitted", "Slurm does not know the job, and it has not started"


def controller_is_here(events: list[Event]) -> int | None:
    """Pid of the run's controller, when it lives on this machine."""
    start = next((event for event in events if event.kind == "run-start"), None)
    if start is None or start.data.get("host") != socket.gethostname():
        return None
    pid = int(start.data["pid"])
    return pid if start_ticks(pid) == start.data.get("pid_start") else None


def _read_metrics(found: RunState, plan: Plan) -> None:
    steps = read_metrics(Path(plan.run_dir))
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
        after = (last + 1) // interval * interval + interval - 1 if interval else final
        found.next_checkpoint = min(after, final)
