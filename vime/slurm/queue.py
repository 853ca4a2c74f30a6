"""Questions to Slurm about jobs, steps and nodes, and orders to it. Every call has a deadline.

Answers are read line by line, and a line that is not Slurm's is skipped: sites print notices before, between and after.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vime.slurm.client import CALL_SECONDS, SlurmError, call, running
from vime.slurm.hostlist import expand_hosts

ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY",
    "REVOKED",
)  # fmt: skip
"""States after which a job never runs again by itself. Every other one, known or not, is that of a live job."""
RUNNING = (
    "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "UPDATE_DB",
)  # fmt: skip


@dataclass(frozen=True)
class JobState:
    """A job as the queue shows it."""

    job_id: str
    state: str
    """RUNNING, PENDING, COMPLETED, CANCELLED, NODE_FAIL, …"""
    reason: str = ""
    nodelist: str = ""
    start: float | None = None
    """Unix seconds; expected while the job is pending."""
    end: float | None = None
    comment: str = ""
    restarts: int = 0
    time_limit_minutes: int | None = None
    """None: without limit, or not known."""
    excluded: str = ""
    """Node list that the job is kept off."""

    @property
    def phase(self) -> Literal["waiting", "running", "ended"]:
        """Meaning of the state: the job has yet to start (again), runs, or has ended."""
        if self.state in ENDED:
            return "ended"
        return "running" if self.state in RUNNING else "waiting"

    @property
    def active(self) -> bool:
        """True until the job has ended."""
        return self.phase != "ended"


def parse_time(text: str) -> float | None:
    """Unix seconds of a time as `%s` or as Slurm's standard local time; None for `Unknown`, `N/A` and `NONE`."""
    if text.isdigit():
        return float(text)
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def parse_limit(text: str) -> int | None:
    """Minutes of a limit in Slurm's spelling: `7-00:00:00`, `1:00:00`, `30:00`; None for `UNLIMITED`, `infinite`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def parse_job(text: str) -> JobState | None:
    """A job of `scontrol show job`, with or without `-o`; None where the text has none.

    `Key=value` words; the comment, which may hold spaces, is found by the keys around it.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("JobId=")), None)
    if first is None:
        return None
    rest = lines[first + 1 :]
    indented = next((i for i, line in enumerate(rest) if not line.startswith(" ")), len(rest))
    values: dict[str, str] = {}
    key = ""
    for word in " ".join([lines[first], *rest[:indented]]).split():
        name, equals, value = word.partition("=")
        if equals and name[:1].isupper() and name.replace("_", "").replace("/", "").replace(":", "").isalnum():
            key = name
            values[key] = value
        elif key:
            values[key] += f" {word}"
    return JobState(
        job_id=values["JobId"],
        state=_state(values.get("JobState", "UNKNOWN")),
        reason=_given(values.get("Reason")),
        nodelist=_given(values.get("NodeList")),
        start=parse_time(values.get("StartTime", "")),
        end=parse_time(values.get("EndTime", "")),
        comment=_given(values.get("Comment")),
        restarts=int(values.get("Restarts", "0")),
        time_limit_minutes=parse_limit(values.get("TimeLimit", "")),
        excluded=_given(values.get("ExcNodeList")),
    )


def _given(text: str | None) -> str:
    return "" if text in (None, "None", "(null)") else text


def _state(text: str) -> str:
    """The base state: `CANCELLED by 1000`, `CANCELLED+`, `RUNNING,SIGNALING` say more."""
    return re.split(r"[ +,]", text.strip())[0]


def job_state(job_id: str, *, seconds: float = CALL_SECONDS) -> JobState | None:
    """A job that slurmctld still knows, else what slurmdbd kept, else None, also where neither answers."""
    try:
        return query_job(job_id, seconds=seconds)
    except SlurmError:
        return None


def query_job(job_id: str, *, seconds: float = CALL_SECONDS) -> JobState | None:
    """As `job_state`. Raises SlurmError where slurmctld does not answer and slurmdbd does not know the job."""
    silent: SlurmError | None = None
    try:
        if (found := parse_job(call("scontrol", "show", "job", "-o", job_id, seconds=seconds))) is not None:
            return found
        silent = SlurmError(f"scontrol shows no job {job_id} in its answer")
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            silent = error
    try:
        rows = accounting_rows(job_id, "State,NodeList,Start,End", seconds=seconds)
    except SlurmError:
        rows = []  # no accounting here: the journal of the run is what remains
    if silent is not None and not rows:
        raise silent
    if not rows:
        return None
    state, nodes, begin, end = rows[-1]
    return JobState(job_id, _state(state), nodelist=nodes, start=parse_time(begin), end=parse_time(end))


def accounting_rows(job_id: str, fields: str, *, seconds: float = CALL_SECONDS) -> list[list[str]]:
    """Values of these fields, a row a start of the job, oldest first. Raises SlurmError without accounting."""
    text = call("sacct", "-nPXD", "-j", job_id, "-o", f"JobIDRaw,{fields}", seconds=seconds)
    rows = [line.split("|") for line in text.splitlines()]
    return [row[1:] for row in rows if row[0] == job_id and len(row) == 2 + fields.count(",")]


def past_states(job_id: str) -> list[str]:
    """State of every start of a job, the first one first; empty without accounting."""
    try:
        states = [_state(row[0]) for row in accounting_rows(job_id, "State")]
    except SlurmError:
        # No accounting here: the journal of the run is what remains.
        return []
    # A job that shrank has a row more for the same start.
    return [state for state in states if state != "RESIZING"]


def jobs_named(name: str, *, seconds: float = CALL_SECONDS) -> list[str]:
    """Ids of this person's queued jobs of a name, the latest submission last."""
    lines = call("squeue", "--noheader", "--me", f"--name={name}", "--format=%A", seconds=seconds).splitlines()
    return sorted((line.strip() for line in lines if line.strip().isdigit()), key=int)


def job_memory(job_id: str) -> dict[str, int]:
    """Bytes that a job is given on each of its nodes; empty where memory is not a resource, or Slurm is away."""
    try:
        text = call("scontrol", "show", "job", "-d", job_id)
    except SlurmError:
        # What the nodes report of their memory is still looked at.
        return {}
    return {name: memory for nodes, memory in parse_node_memory(text) for name in expand_hosts(nodes)}


def parse_node_memory(text: str) -> list[tuple[str, int]]:
    """(node list, bytes a node) from `scontrol show job -d`: lines `Nodes=n[1-4] CPU_IDs=0-63 Mem=160000 GRES=`."""
    found = re.findall(r"^\s+Nodes=(\S+) CPU_IDs=\S+ Mem=(\d+)", text, re.MULTILINE)
    return [(nodes, int(megabytes) * 2**20) for nodes, megabytes in found if int(megabytes)]


def leaf_switches() -> dict[str, str]:
    """The leaf switch of every node; empty without a topology."""
    try:
        text = call("scontrol", "show", "topology")
    except SlurmError:
        # A cluster that does not describe its network.
        return {}
    return {name: switch for switch, nodes in parse_topology(text) for name in expand_hosts(nodes)}


def parse_topology(text: str) -> list[tuple[str, str]]:
    """(leaf switch, node list) from `scontrol show topology`."""
    return re.findall(r"^SwitchName=(\S+) Level=0 .*?Nodes=(\S+)", text, re.MULTILINE)


def node_states(nodelist: str, *, seconds: float = CALL_SECONDS) -> dict[str, str]:
    """State of each node in sinfo's words (`down*`, `allocated`), in the list's order; empty when Slurm is away."""
    try:
        text = call("sinfo", "-hN", "-n", nodelist, "-o", "%N %T", seconds=seconds)
    except SlurmError:
        return {}
    words = (line.split() for line in text.splitlines())
    states = {pair[0]: pair[1] for pair in words if len(pair) == 2}
    return {name: states[name] for name in expand_hosts(nodelist) if name in states}


def is_lost(state: str) -> bool:
    """True for the state of a failed node; a trailing `*` marks one that does not answer."""
    return state.endswith("*") or state.startswith(("down", "fail", "error", "unknown"))


def loss_text(state: str) -> str:
    """Evidence of a lost node, from its state: `is down for Slurm`, or `does not answer Slurm (allocated*)`."""
    if is_lost(state.rstrip("*")):
        return f"is {state.rstrip('*')} for Slurm"
    return f"does not answer Slurm ({state})"


def exclude(job_id: str, hosts: Iterable[str], *, seconds: float = CALL_SECONDS) -> None:
    """Keep a pending job off these nodes, and those that it was kept off before."""
    state = job_state(job_id, seconds=seconds)
    before = state.excluded if state is not None else ""
    names = ",".join([*([before] if before else []), *hosts])
    call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}", seconds=seconds)


def step_ids(job_id: str, name: str) -> list[str]:
    """Ids (`12.3`) of a job's running steps of this name."""
    lines = call("squeue", "-h", "-s", "-j", job_id, "-o", "%i %j").splitlines()
    pairs = [line.split(None, 1) for line in lines]
    return [pair[0] for pair in pairs if pair[1:] == [name] and pair[0].startswith(f"{job_id}.")]


@contextlib.contextmanager
def signalling(steps: Sequence[str], number: str) -> Iterator[None]:
    """Have these steps signalled within the block. scancel waits half a minute and more for a node that is lost, while
    the others have the signal at once; so nobody waits for scancel."""
    with running("scancel", "-s", number, *steps) if steps else contextlib.nullcontext():
        yield


def cancel(job_id: str) -> None:
    call("scancel", job_id)


def requeue(job_id: str) -> None:
    call("scontrol", "requeue", job_id)


def set_comment(job_id: str, text: str) -> None:
    """Set what `squeue -o %k` shows."""
    call("scontrol", "update", f"JobId={job_id}", f"Comment={text}")


def cpus_per_node(environ: Mapping[str, str] = os.environ) -> int | None:
    """CPUs that the job has on its smallest node, from `SLURM_JOB_CPUS_PER_NODE` (`64(x3),32`)."""
    text = environ.get("SLURM_JOB_CPUS_PER_NODE", "")
    counts = [int(part.partition("(")[0]) for part in text.split(",") if part]
    return min(counts, default=None)
