"""Protocol of the scheduler that owns the machines; one class implements it for each scheduler.

`slurm` and `local` (this machine alone) ship with vime. A cluster profile names any other class as
`kind: package.module:Class`; no code outside of such a class depends on the scheduler.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from vime.errors import BadInput, Cause
from vime.run.plan import Cluster, Plan

PATIENCE_S = 30.0
"""Default deadline of one query, in seconds."""
Phase = Literal["waiting", "running", "ended"]


@dataclass(frozen=True)
class JobState:
    """State of a job, as reported by its scheduler."""

    job_id: str
    state: str
    """The scheduler's own word, for people: `PENDING`, `NODE_FAIL`, …"""
    phase: Phase
    """Meaning of the state. `waiting`: will start, perhaps again. An unknown state is never `ended`."""
    reason: str = ""
    """Reason for which the job waits; empty if the scheduler gives none."""
    start: float | None = None
    """Start, Unix seconds; an estimate while the job waits."""
    end: float | None = None
    """Unix seconds at which the allocation ends; None: never, or unknown."""

    @property
    def active(self) -> bool:
        """True until the job has ended."""
        return self.phase != "ended"


@dataclass(frozen=True)
class OwnJob:
    """The job that this process is part of."""

    job_id: str
    nodes: int
    """Nodes of its allocation."""
    partition: str | None = None
    time_limit_minutes: int | None = None
    """None: no limit, or unknown."""
    submit_dir: str = ""
    """Folder in which the job was submitted; it may hold plug-ins of the run."""


@dataclass(frozen=True)
class Wanted:
    """Requested machines, before the profile is completed."""

    nodes: int
    """Nodes, including spares."""
    gpus_per_node: int
    """GPUs per node; 0: the recipe runs without GPUs."""
    spares: int = 0
    partition: str | None = None
    shape: Literal["allocation", "chain"] = "allocation"


@dataclass(frozen=True)
class Preview:
    """One text of a dry run."""

    title: str
    text: str


class Scheduler(Protocol):
    """A scheduler, from the first look at its machines to the controller inside its job.

    Constructed without arguments, on login nodes, batch hosts and compute nodes alike; keeps no state between calls.
    Its module imports neither torch, ray nor vllm. Every call has a deadline. Raises BadInput for a request that cannot
    be met (exit code 2), and SchedulerError if the scheduler is absent, silent or fails.
    """

    copies_code: bool
    """True if jobs start later than their submission, so that a run needs a copy of vime's code."""

    def resolve(self, cluster: Cluster, wanted: Wanted, *, timeout_s: float) -> tuple[Cluster, list[str]]:
        """Complete a profile with the scheduler's facts about its nodes.

        Returns the profile with partition, node sizes and time limit filled in (existing values are kept), and a note
        for each choice. Raises BadInput if no nodes match, SchedulerError after `timeout_s` seconds.
        """
        ...

    def preview(self, plan: Plan) -> list[Preview]:
        """Texts that a submission would pass on, for `--dry-run`. Queries no scheduler and writes nothing."""
        ...

    def write_scripts(self, plan: Plan) -> list[Path]:
        """Write scripts that a person can submit without vime to the run folder; return their paths, in order."""
        ...

    def check(self, plan: Plan) -> None:
        """Raise early the errors of a submission. Called before anything of the run is written; queues nothing."""
        ...

    def submit(self, plan: Plan) -> int:
        """Start the run whose folder is written, record its jobs (`vime.run.jobs`) and say so on stdout.

        Returns the exit code of `vime.submit`: 0 for a queued run, the run's cause for one that has already ended.
        After an exception no job of the run is left in the queue.
        """
        ...

    def after(self, plan: Plan, job_ids: Sequence[str]) -> Plan:
        """Plan of a run whose job starts only after these jobs have ended, with or without success.

        The plan itself without any. Raises BadInput if the scheduler cannot order jobs, also without any.
        """
        ...

    def job(self, job_id: str, *, timeout_s: float = PATIENCE_S) -> JobState | None:
        """State of a job, running or ended; None if the scheduler no longer knows it."""
        ...

    def cancel(self, job_id: str) -> None:
        """Request the end of a job and return at once. No error if it has already ended."""
        ...

    def hosts(self, job_id: str) -> tuple[str, ...]:
        """Names of a running job's nodes in the order of its allocation. Raises BadInput for any other job."""
        ...

    def attach(
        self, job_id: str, host: str, command: Sequence[str], *, run_dir: str, terminal: bool
    ) -> tuple[list[str], dict[str, str]]:
        """Program and environment that run a command on a node of the job, next to its running processes.

        `host` is one of `hosts`; `terminal`: the command is interactive. Raises BadInput if that is impossible.
        """
        ...

    def own_job(self) -> OwnJob | None:
        """Job that this process is part of; None outside of any."""
        ...

    def control(self, run_dir: str, *, link: str | None = None) -> Cause:
        """Run the controller of a run folder, or of one link of a chain, in this process to its end.

        `vime.launch.controller.control` does it with a Runner (`vime.launch.steps`) that starts job steps.
        """
        ...


BUILT_IN: Mapping[str, str] = {"slurm": "vime.schedulers.slurm:Slurm", "local": "vime.schedulers.local:Local"}


def find_scheduler(kind: str) -> Scheduler:
    """Scheduler of a profile's `kind`. Raises BadInput if it cannot be imported."""
    module, colon, name = BUILT_IN.get(kind, kind).partition(":")
    if not colon:
        raise BadInput(f"kind is {kind!r}: give slurm, local, or package.module:Class of a scheduler")
    try:
        return getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise BadInput(f"kind is {kind!r}, which cannot be used: {error} (docs/clusters.md)") from error
