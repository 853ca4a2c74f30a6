"""Cause of a failed run: a pure decision from facts, which come from a step's reports and its launcher's text."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vime.errors import Cause, VimeError
from vime.launch.steps import Step
from vime.run.last_words import cause_of_text, telling_line

_OUT_OF_MEMORY = re.compile(r"out.of.memory|oom[-_ ]?kill|exceeded (job |step )?memory limit", re.IGNORECASE)
_NODE_FAILURE = re.compile(
    r"node failure on (\S+)|(\S+): tasks? .*node fail|failed on node (\S+): (?:communication connection|job cred)", re.I
)
_LOST_NODE = re.compile(r"DUE TO NODE FAILURE|Job credential revoked|Communication connection failure", re.IGNORECASE)
_OUT_OF_MEMORY_ON = re.compile(r"slurmstepd-(\S+?): error: .*exceeded|srun: error: (\S+): tasks? .*out of memory", re.I)
_KILLED_TASK = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)")
_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_NOT_CREATED = re.compile(r"unable to (create step|confirm allocation|contact slurm)|socket timed out", re.IGNORECASE)


@dataclass(frozen=True)
class Failure:
    """The end of a run that did not succeed."""

    cause: Cause
    text: str
    """One line: what happened where."""
    stage: str | None = None
    node: str | None = None
    """Slurm's name of the node at fault."""
    rank: int | None = None
    tail: tuple[str, ...] = ()
    """Last lines of the failing task's log."""
    from_outside: bool = False
    """True if someone else killed the run's processes, which says nothing about the next attempt."""


class RunFailed(VimeError):
    """Raised to end the run with a failure."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure
        self.cause = failure.cause


@dataclass(frozen=True)
class TaskExit:
    """A task that ended without a request."""

    node: str
    """Slurm's name."""
    rank: int
    code: int
    signal: int | None = None
    meaning: str = ""
    """`exit code 3` or `SIGKILL`."""
    tail: tuple[str, ...] = ()


@dataclass(frozen=True)
class Account:
    """The training driver's account of its own end (`vime.train.causes`)."""

    cause: Cause
    text: str
    nodes: tuple[str, ...] = ()
    """Slurm's names of the nodes at fault."""
    rank: int | None = None


@dataclass(frozen=True)
class Facts:
    """All evidence about a failed stage, from any source."""

    stage: str
    lost: Mapping[str, str] = field(default_factory=dict)
    """Nodes that Slurm has lost, or whose slurmd does not answer, each with the evidence."""
    faulty: Mapping[str, str] = field(default_factory=dict)
    """Nodes whose GPUs failed the post-mortem, each with its findings."""
    service: Failure | None = None
    """Failure of a service that ended while the stage needed it."""
    account: Account | None = None
    exits: tuple[TaskExit, ...] = ()
    """Task ends, in the order of their reports."""
    said: tuple[str, ...] = ()
    """Last lines of the launcher, and of tasks that could not report."""
    exit_code: int = 0
    """Exit code of the launcher."""
    unmet: str = ""
    """Unmet expectation: a missing result, or a service that ended."""
    late: Failure | None = None
    """Failure of a stage that did not end in time."""


def decide(facts: Facts) -> Failure:
    """Decide on one cause and one culprit. Pure.

    Order of precedence: facts about nodes (Slurm's, the post-mortem's, srun's, Ray's), a service that died during the
    stage, the driver's account, the exit code of the first failed task, texts.
    """
    if facts.lost:
        return _node_failure(facts, facts.lost)
    if facts.faulty:
        return _node_failure(facts, facts.faulty)
    text = "\n".join(facts.said)
    named = _NODE_FAILURE.search(text)
    if named or _LOST_NODE.search(text):
        node = next(filter(None, named.groups())).strip(":,") if named else None
        return _failure(facts, Cause.NODE_FAILURE, "the node was lost", node, None, facts.said)
    if facts.service is not None:
        return facts.service
    if facts.account is not None:
        return _of_account(facts, facts.account)
    if facts.late is not None:
        return facts.late
    if facts.exits and not facts.unmet:
        return _of_exit(facts, facts.exits[0])
    if _OUT_OF_MEMORY.search(text):
        return _out_of_memory(facts, None)
    if node := _killed_by_another(facts.said):
        told = "its task and supervisor were killed from outside"
        return replace(_failure(facts, Cause.CRASH, told, node, None, facts.said), from_outside=True)
    if facts.unmet:
        first = facts.exits[0] if facts.exits else None
        tail = first.tail if first else facts.said
        node, rank = (first.node, first.rank) if first else (None, None)
        return _failure(facts, Cause.CODE_ERROR, f"{facts.unmet}: {telling_line(tail)}", node, rank, tail)
    cause = cause_of_exit(facts.exit_code, None)
    told = f"exit code {facts.exit_code}: {telling_line(facts.said)}"
    return _failure(facts, cause, told, _first_killed(facts.said), None, facts.said)


def _node_failure(facts: Facts, nodes: Mapping[str, str]) -> Failure:
    """Failure of a lost or faulty node: the one that the driver blames too, else the first."""
    blamed = facts.account.nodes if facts.account is not None else ()
    culprit = next((node for node in nodes if node in blamed), next(iter(nodes)))
    told = "; ".join(f"{node} {how}" for node, how in nodes.items())
    tail = facts.exits[0].tail if facts.exits else facts.said
    return _failure(facts, Cause.NODE_FAILURE, told, culprit, None, tail)


def _of_account(facts: Facts, account: Account) -> Failure:
    first = facts.exits[0] if facts.exits else None
    node = account.nodes[0] if account.nodes else (first.node if first else None)
    rank = account.rank if account.nodes else (first.rank if first else None)
    tail = first.tail if first else facts.said
    return _failure(facts, account.cause, account.text, node, rank, tail)


def _of_exit(facts: Facts, task: TaskExit) -> Failure:
    if task.signal == signal.SIGKILL and _OUT_OF_MEMORY.search("\n".join(facts.said)):
        return _out_of_memory(facts, task)
    cause, tail = cause_of_exit(task.code, task.signal), task.tail or facts.said
    if cause is Cause.CODE_ERROR and task.signal is None:
        cause = cause_of_text(tail) or cause
    return _failure(facts, cause, f"{task.meaning}: {telling_line(tail)}", task.node, task.rank, tail)


def _out_of_memory(facts: Facts, first: TaskExit | None) -> Failure:
    """Failure of a task that took too much memory. Slurm then kills all tasks of the step, whose reports come in any
    order: its own words say whose it was. `first`: the first task that reported."""
    line = next(line.strip() for line in facts.said if _OUT_OF_MEMORY.search(line))
    on = _OUT_OF_MEMORY_ON.search("\n".join(facts.said))
    node = on[1] or on[2] if on else first.node if first else _first_killed(facts.said)
    task = next((task for task in facts.exits if task.node == node), None)
    if task is None:
        return _failure(facts, Cause.OUT_OF_MEMORY, line, node, None, facts.said)
    return _failure(facts, Cause.OUT_OF_MEMORY, f"{task.meaning}: {line}", node, task.rank, task.tail or facts.said)


def cause_of_exit(code: int, number: int | None) -> Cause:
    """Cause of an exit: vime's programs exit with theirs, a crash or a kill is CRASH, anything else CODE_ERROR."""
    if number is not None:
        return Cause.CRASH if number in _CRASHES else Cause.CODE_ERROR
    try:
        cause = Cause(code)
    except ValueError:
        return Cause.CODE_ERROR
    return Cause.CODE_ERROR if cause is Cause.SUCCESS else cause


# -- from a step to facts --


def facts_of(step: Step, exit_code: int = 0, nodes: tuple[str, ...] = ()) -> Facts:
    """Facts from the step itself; `nodes` are Slurm's names of the logical nodes."""
    ends = step.of_kind("exit")
    own = [report for report in ends if not report.data["stopped"] and report.data["code"]]
    quiet = not own and not exit_code
    facts = Facts(
        step.stage.name,
        account=_account(step, nodes),
        exits=tuple(_task_exit(step, report.rank, report.data) for report in (own or (ends if quiet else []))),
        said=tuple(step.told()),
        exit_code=exit_code,
    )
    if not quiet:
        return facts
    # Some versions of srun exit with 0 although their only task was on a lost node.
    return replace(facts, unmet=f"the {'service' if step.stage.service else 'stage'} ended too early")


def _task_exit(step: Step, rank: int, data: Mapping) -> TaskExit:
    tail = tuple(data["tail"])
    return TaskExit(step.name_of(rank), rank, data["code"], data["signal"], data.get("meaning", ""), tail)


def _account(step: Step, nodes: tuple[str, ...]) -> Account | None:
    told = step.of_kind("failure")
    if not told:
        return None
    data = told[-1].data
    names = tuple(nodes[node] for node in data["nodes"] if node < len(nodes))
    return Account(Cause[data["cause"]], data["text"], names, data["rank"])


def was_refused(step: Step) -> bool:
    """True if Slurm did not create the step, which happens while its controller restarts; worth a retry."""
    return not step.of_kind("start") and _NOT_CREATED.search("\n".join(step.told())) is not None


def may_repeat(step: Step) -> bool:
    """True if the step failed for a reason outside of it that may be over soon, and left nothing behind.

    A node that comes back from a fault ends what it still holds of the job, and takes new tasks of the same job along.
    """
    return was_refused(step) or (not step.stage.outputs and decide(facts_of(step)).from_outside)


def late(step: Step, seconds: float) -> Failure:
    """Failure of a stage that did not end, or a service that was not ready, in time."""
    ended = {report.rank for report in step.of_kind("exit")}
    ready = {report.rank for report in step.of_kind("ready")}
    started = {report.rank for report in step.of_kind("start")}
    world = len(step.places) * step.stage.tasks_per_node
    absent = sorted(set(range(world)) - started)
    busy = sorted(started - ended - ready)
    waiting = [report.data.get("missing") for report in step.of_kind("waiting")][-1:]
    if absent:
        missing = f"ranks {absent} never started"
    elif waiting and waiting[0]:
        missing = f"missing: {', '.join(waiting[0])}"
    else:
        missing = f"ranks {busy} ({', '.join(map(step.name_of, busy))}) have not ended"
    what = "ready" if step.stage.service else "done"
    rank = busy[0] if busy and not absent else None
    node = step.name_of(rank) if rank is not None else None
    facts = Facts(step.stage.name)
    return _failure(facts, Cause.DEADLINE, f"not {what} after {seconds:.0f} s: {missing}", node, rank, step.told())


def hung(step: Step, seconds: float) -> Failure:
    """Failure of a silent driver: its process is stopped, or its event loop blocked."""
    text = f"the driver has not answered for {seconds:.0f} s"
    return _failure(Facts(step.stage.name), Cause.CRASH, text, step.name_of(0), 0, step.told())


def _killed_by_another(said: Sequence[str]) -> str | None:
    """Node of the first task that was killed together with its supervisor, so that only srun reports it."""
    ends = (match for line in said if (match := _KILLED_TASK.search(line)))
    return next((match[1] for match in ends if match[3].strip() == "Killed"), None)


def _first_killed(said: Sequence[str]) -> str | None:
    for line in said:
        if match := _KILLED_TASK.search(line):
            return match[1]
    return None


def _failure(facts: Facts, cause: Cause, text: str, node: str | None, rank: int | None, tail: Sequence[str]) -> Failure:
    where = "" if node is None else f" on {node}" + ("" if rank is None else f" (rank {rank})")
    return Failure(cause, f"{facts.stage} failed{where}: {text}", facts.stage, node, rank, tuple(tail))
