"""Why a stage failed: the first task that did, its node and rank, and the cause, from reports and launcher output."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass

from vime.errors import STORAGE_ERRNOS, Cause, VimeError
from vime.launch.steps import Step

_OUT_OF_MEMORY = re.compile(r"out.of.memory|oom[-_ ]?kill|exceeded (job |step )?memory limit", re.IGNORECASE)
_NODE_FAILURE = re.compile(r"node failure on (\S+)|(?:error: )?(\S+): task .*node fail", re.IGNORECASE)
_LOST_NODE = re.compile(r"DUE TO NODE FAILURE|Job credential revoked|Communication connection failure", re.IGNORECASE)
_OUT_OF_MEMORY_ON = re.compile(r"slurmstepd-(\S+?): error: .*exceeded|srun: error: (\S+): tasks? .*out of memory", re.I)
_KILLED_TASK = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)")
_STORAGE = re.compile("|".join(os.strerror(number) for number in sorted(STORAGE_ERRNOS)))
_NOT_CREATED = re.compile(r"unable to (create step|confirm allocation|contact slurm)|socket timed out", re.IGNORECASE)
_TELLING = re.compile(r"\berror\b|exception|\bfatal\b|not found|killed", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """The end of a run that did not succeed."""

    cause: Cause
    text: str
    """One line: what happened where."""
    stage: str | None = None
    node: str | None = None
    rank: int | None = None
    tail: tuple[str, ...] = ()
    """Last lines of the failing task's log."""


class RunFailed(VimeError):
    """Ends the run."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.cause = failure.cause


def cause_of_exit(code: int, number: int | None) -> Cause:
    """vime's programs exit with their cause; anything else is an error of the code."""
    if number is not None:
        return Cause.CODE_ERROR
    try:
        cause = Cause(code)
    except ValueError:
        return Cause.CODE_ERROR
    return Cause.CODE_ERROR if cause is Cause.SUCCESS else cause


def telling_line(tail: tuple[str, ...] | list[str]) -> str:
    """The line of a log's tail that says most: the last that speaks of an error, else the last."""
    lines = [line.strip() for line in tail if line.strip()]
    telling = [line for line in lines if _TELLING.search(line)]
    return (telling or lines or ["no output"])[-1][:500]


def diagnose(step: Step, exit_code: int) -> Failure:
    """The failure of a step that has ended."""
    told = step.told()
    text = "\n".join(told)
    exits = [report for report in step.of_kind("exit") if not report.data["stopped"] and report.data["code"]]
    lost = _NODE_FAILURE.search(text)
    if lost or _LOST_NODE.search(text):
        node = lost and (lost[1] or lost[2])
        return _failure(step, Cause.NODE_FAILURE, "the node was lost", node, None, told)
    if exits:
        first = exits[0]
        data = first.data
        cause = cause_of_exit(data["code"], data["signal"])
        if data["signal"] == signal.SIGKILL and _OUT_OF_MEMORY.search(text):
            cause = Cause.OUT_OF_MEMORY
        told = data["tail"] or told
        if cause is Cause.CODE_ERROR and data["signal"] is None and _STORAGE.search("\n".join(told)):
            cause = Cause.STORAGE
        return _failure(step, cause, f"{data['meaning']}: {telling_line(told)}", data["host"], first.rank, told)
    if _OUT_OF_MEMORY.search(text):
        line = next(line for line in told if _OUT_OF_MEMORY.search(line))
        on = _OUT_OF_MEMORY_ON.search(text)
        node = on[1] or on[2] if on else _first_killed(told)
        return _failure(step, Cause.OUT_OF_MEMORY, line.strip(), node, None, told)
    cause = cause_of_exit(exit_code, None)
    return _failure(step, cause, f"exit code {exit_code}: {telling_line(told)}", _first_killed(told), None, told)


def was_refused(step: Step) -> bool:
    """Whether Slurm did not create the step: it does not while its controller starts again, and soon does."""
    return not step.of_kind("start") and _NOT_CREATED.search("\n".join(step.told())) is not None


def ended_early(step: Step, exit_code: int) -> Failure:
    """A service that ended while it was needed, with whatever code, or a stage that did not say that it was done."""
    if exit_code:
        return diagnose(step, exit_code)
    what = "service" if step.stage.service else "stage"
    exits = step.of_kind("exit")
    first = exits[0] if exits else None
    told = first.data["tail"] if first else step.told()
    node, rank = (first.data["host"], first.rank) if first else (None, None)
    return _failure(step, Cause.CODE_ERROR, f"the {what} ended too early: {telling_line(told)}", node, rank, told)


def late(step: Step, seconds: float) -> Failure:
    """A stage that did not end, or a service that was not ready, in time."""
    ended = {report.rank for report in step.of_kind("exit")}
    ready = {report.rank for report in step.of_kind("ready")}
    hosts = step.host_of_rank
    world = len(step.places) * step.stage.tasks_per_node
    absent = sorted(set(range(world)) - set(hosts))
    busy = sorted(set(hosts) - ended - ready)
    waiting = [report.data.get("missing") for report in step.of_kind("waiting")][-1:]
    if absent:
        missing = f"ranks {absent} never started"
    elif waiting and waiting[0]:
        missing = f"missing: {', '.join(waiting[0])}"
    else:
        missing = f"ranks {busy} ({', '.join(hosts[rank] for rank in busy)}) have not ended"
    what = "ready" if step.stage.service else "done"
    rank = busy[0] if busy and not absent else None
    node = hosts.get(rank) if rank is not None else None
    return _failure(step, Cause.DEADLINE, f"not {what} after {seconds:.0f} s: {missing}", node, rank, step.told())


def _first_killed(told: list[str]) -> str | None:
    for line in told:
        if match := _KILLED_TASK.search(line):
            return match[1]
    return None


def _failure(
    step: Step, cause: Cause, text: str, node: str | None, rank: int | None, tail: list[str] | tuple[str, ...]
) -> Failure:
    where = "" if node is None else f" on {node}" + ("" if rank is None else f" (rank {rank})")
    return Failure(cause, f"{step.stage.name} failed{where}: {text}", step.stage.name, node, rank, tuple(tail))
