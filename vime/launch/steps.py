"""A running stage: its launcher processes and its tasks' reports, the same under Slurm and on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vime.errors import Cause
from vime.run.folder import launcher_log
from vime.run.messages import Assembler, Report
from vime.run.plan import Stage
from vime.system.private import private_folder


@dataclass(frozen=True)
class AllocatedNode:
    """A node of the allocation, as seen by a stage."""

    index: int
    """Number of the logical node; before the binding exists, the place in the allocation."""
    name: str
    """Slurm's name of the node."""


@dataclass
class Step:
    """Processes of one stage. `pump` must be called repeatedly; the other methods show its findings."""

    stage: Stage
    places: tuple[AllocatedNode, ...]
    processes: list[subprocess.Popen[bytes]]
    launcher_log: Path
    log_offset: int = 0
    """Offset of this step's part of the launcher log: earlier starts of the run wrote to it too."""
    started: float = field(default_factory=time.monotonic)
    started_at: float = field(default_factory=time.time)
    """Unix seconds."""
    reports: list[Report] = field(default_factory=list)
    _alive: float | None = None
    _assemblers: list[Assembler] = field(default_factory=list)
    _open: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._assemblers = [Assembler() for _ in self.processes]
        self._open = [True for _ in self.processes]
        for process in self.processes:
            os.set_blocking(_output(process), False)

    def pump(self) -> list[Report]:
        """Collect the reports that have arrived since the last call."""
        new: list[Report] = []
        for i, process in enumerate(self.processes):
            while self._open[i]:
                try:
                    data = os.read(_output(process), 65536)
                except BlockingIOError:
                    break
                if not data:
                    self._open[i] = False
                new.extend(self._assemblers[i].feed(data))
        if any(report.kind == "alive" for report in new):
            self._alive = time.monotonic()
        self.reports.extend(report for report in new if report.kind != "alive")
        return new

    @property
    def silent_s(self) -> float | None:
        """Seconds since the last `alive` report of a task; None before the first."""
        return None if self._alive is None else time.monotonic() - self._alive

    def descriptors(self) -> list[int]:
        """Descriptors that become readable when a report arrives."""
        return [_output(process) for process, is_open in zip(self.processes, self._open, strict=True) if is_open]

    def poll(self) -> int | None:
        """None while processes run; then 0, or the exit code of a failed one. Call `pump` once more afterwards."""
        codes = [process.poll() for process in self.processes]
        failed = [code for code in codes if code]
        if failed and len(self.processes) > 1:
            # One failed task of several local ones fails the stage.
            return failed[0]
        return None if None in codes else max(failed, key=abs, default=0)

    def of_kind(self, kind: str) -> list[Report]:
        return [report for report in self.reports if report.kind == kind]

    @property
    def silent_places(self) -> set[AllocatedNode]:
        """Nodes with a task that started but reported no end: its supervisor was killed, or its node is lost."""
        ended = {report.rank for report in self.of_kind("exit")}
        started = {report.rank for report in self.of_kind("start")}
        return {self.places[rank // self.stage.tasks_per_node] for rank in started - ended}

    @property
    def unended_places(self) -> set[AllocatedNode]:
        """Nodes with a task that has reported no end, whether it has started or not."""
        ended = {report.rank for report in self.of_kind("exit")}
        tasks = range(len(self.places) * self.stage.tasks_per_node)
        return {self.places[rank // self.stage.tasks_per_node] for rank in tasks if rank not in ended}

    def name_of(self, rank: int) -> str:
        """Slurm's name of a task's node."""
        return self.places[rank // self.stage.tasks_per_node].name

    @property
    def ended_quietly(self) -> bool:
        """True if a task has ended with code 0 without a request to stop."""
        return any(not report.data["code"] and not report.data["stopped"] for report in self.of_kind("exit"))

    def told(self, lines: int = 20) -> list[str]:
        """Last lines of the launcher and of tasks that could not report."""
        other = [line for assembler in self._assemblers for line in assembler.other]
        try:
            text = self.launcher_log.read_bytes()[self.log_offset :].decode("utf-8", errors="replace")
        except FileNotFoundError:
            text = ""
        return [*other, *text.splitlines()][-lines:]

    def wait(self, seconds: float, *, enough: Callable[[], bool] = lambda: False) -> bool:
        """True if all processes end within this time, or until `enough` holds; pumps meanwhile."""
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in self.processes):
            self.pump()
            if time.monotonic() > deadline or enough():
                return False
            time.sleep(0.05)
        self.pump()
        return True

    def close(self) -> None:
        for process in self.processes:
            if process.stdout is not None:
                process.stdout.close()


class Runner(Protocol):
    """Starts and stops stages."""

    job: str
    """Slurm's job id, or a name for this run on this machine."""
    restart: int
    """Number of requeues of the job so far."""
    can_requeue: bool
    environment: dict[str, str]
    """Variables for the tasks of all later steps: values too recent for a file to be visible on all nodes."""

    def nodes(self) -> tuple[str, ...]:
        """Names of the allocation's nodes, in its order."""
        ...

    def start(self, stage: Stage, places: tuple[AllocatedNode, ...]) -> Step: ...

    def stop(self, step: Step, grace_s: float) -> None:
        """End a step and wait for it: TERM to every task, KILL after `grace_s` seconds."""
        ...

    def end_time(self) -> float | None:
        """Unix time at which the allocation ends; None: never, or unknown."""
        ...

    def memory_limits(self) -> dict[str, int]:
        """Bytes of host memory that the job may use, by node name; a node without a limit is left out."""
        ...

    def switches(self) -> dict[str, str]:
        """Leaf switch of every node, by node name; empty if the topology is unknown."""
        ...

    def why_ended(self) -> Cause:
        """Meaning of a TERM, which only Slurm knows."""
        ...

    def why_lost(self, job: str, restart: int) -> Cause:
        """Cause of the end of a start that recorded none itself."""
        ...

    def runs(self, job: str, restart: int) -> bool | None:
        """True while this start of a job of the same kind still runs; None if unknown."""
        ...

    def lost_nodes(self) -> dict[str, str]:
        """Nodes of the allocation that are down or do not answer, by name, each with the evidence."""
        ...

    def requeue(self) -> None:
        """Make the same job run again."""
        ...

    def exclude(self, nodes: Sequence[str]) -> None:
        """Exclude these nodes from the next start of the waiting job."""
        ...

    def show(self, text: str) -> None:
        """Show the job's current activity in the queue."""
        ...


def places_text(places: Sequence[AllocatedNode]) -> str:
    """Places in the form that tasks parse: `0=node01,1=node03`."""
    return ",".join(f"{place.index}={place.name}" for place in places)


def launch(argv: Sequence[str], env: dict[str, str], run_dir: str, stage: str) -> subprocess.Popen[bytes]:
    """Start a launcher process in a new session, its stderr in the stage's launcher log."""
    log = launcher_log(run_dir, stage)
    private_folder(log.parent)
    errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=env, start_new_session=True
        )
    finally:
        os.close(errors)


def log_size(log: Path) -> int:
    """Current size of a launcher log in bytes."""
    return log.stat().st_size if log.exists() else 0


def signal_process(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _output(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return process.stdout.fileno()
