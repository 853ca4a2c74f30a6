"""What vime asks Slurm, and how its answers are read. Every call has a deadline."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from vime.errors import SchedulerError

CALL_SECONDS = 30.0
RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "SPECIAL_EXIT")


class SlurmError(SchedulerError):
    """A Slurm command failed or did not answer."""


def available() -> bool:
    return shutil.which("squeue") is not None


def call(*argv: str, seconds: float = CALL_SECONDS, env: Mapping[str, str] | None = None) -> str:
    """Output of a Slurm command. Raises SlurmError with its last line."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, env=env, errors="replace"
        )
    except FileNotFoundError as error:
        raise SlurmError(f"there is no {argv[0]} on this machine: run it where Slurm is installed") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{' '.join(argv)} did not answer within {seconds:.0f} s") from error
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise SlurmError(f"{' '.join(argv)} exited with {done.returncode}: {words[-1]}")
    return done.stdout


def expand_hosts(nodelist: str) -> tuple[str, ...]:
    """`node[01-03]` as names in order."""
    return tuple(call("scontrol", "show", "hostnames", nodelist).split())


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
        """What the state means: whether the job has yet to start, runs, or has ended."""
        if self.state in RUNNING:
            return "running"
        return "waiting" if self.state in WAITING else "ended"

    @property
    def active(self) -> bool:
        """Whether the job has not ended."""
        return self.phase != "ended"


def parse_time(text: str) -> float | None:
    """Slurm's local time as Unix seconds; None for `Unknown`, `N/A` and `NONE`."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def parse_job(text: str) -> JobState:
    """`scontrol show job -o`: `Key=value` words; the comment, which may hold spaces, is found by the keys around it."""
    values: dict[str, str] = {}
    key = ""
    for word in text.split():
        name, equals, value = word.partition("=")
        if equals and name[:1].isupper() and name.replace("_", "").replace("/", "").replace(":", "").isalnum():
            key = name
            values[key] = value
        elif key:
            values[key] += f" {word}"
    return JobState(
        job_id=values.get("JobId", ""),
        state=values.get("JobState", "UNKNOWN"),
        reason="" if values.get("Reason") == "None" else values.get("Reason", ""),
        nodelist="" if values.get("NodeList") in (None, "(null)") else values["NodeList"],
        start=parse_time(values.get("StartTime", "")),
        end=parse_time(values.get("EndTime", "")),
        comment=values.get("Comment", ""),
        restarts=int(values.get("Restarts", "0")),
        time_limit_minutes=parse_limit(values.get("TimeLimit", "")),
        excluded="" if values.get("ExcNodeList") in (None, "(null)") else values["ExcNodeList"],
    )


def parse_limit(text: str) -> int | None:
    """Minutes of a limit in Slurm's spelling: `7-00:00:00`, `1:00:00`, `30:00`; None for `UNLIMITED`, `infinite`."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + minutes


def job_state(job_id: str, *, seconds: float = CALL_SECONDS) -> JobState | None:
    """A job that slurmctld still knows, else what slurmdbd kept, else None, also where neither answers."""
    try:
        return query_job(job_id, seconds=seconds)
    except SlurmError:
        return None


def query_job(job_id: str, *, seconds: float = CALL_SECONDS) -> JobState | None:
    """The same; raises SlurmError where slurmctld does not answer and slurmdbd does not know the job."""
    silent: SlurmError | None = None
    try:
        return parse_job(call("scontrol", "show", "job", "-o", job_id, seconds=seconds))
    except SlurmError as error:
        if "Invalid job id" not in str(error):
            silent = error
    try:
        text = call("sacct", "-nPXD", "-j", job_id, "-o", "State,NodeList,Start,End", seconds=seconds)
    except SlurmError:
        text = ""  # no accounting here: the journal of the run is what remains
    if silent is not None and not text.strip():
        raise silent
    lines = text.strip().splitlines()
    if not lines:
        return None
    state, nodes, begin, end = lines[-1].split("|")
    return JobState(job_id, state.split()[0], nodelist=nodes, start=parse_time(begin), end=parse_time(end))


def job_memory(job_id: str) -> dict[str, int]:
    """Bytes that a job is given on each of its nodes; empty where memory is not a resource, or Slurm is away."""
    try:
        text = call("scontrol", "show", "job", "-d", job_id)
    except SlurmError:
        # What the nodes tell of their memory is still looked at.
        return {}
    return {
        name: memory
        for nodes, memory in parse_node_memory(text)
        for name in (expand_hosts(nodes) if set(nodes) & set("[,") else (nodes,))
    }


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


def past_states(job_id: str) -> list[str]:
    """State of every start of a job, the first one first; empty without accounting."""
    try:
        text = call("sacct", "-nPXD", "-j", job_id, "-o", "State")
    except SlurmError:
        # No accounting here: the journal of the run is what remains.
        return []
    # A job that shrank has a row more for the same start.
    return [line.split()[0] for line in text.splitlines() if line.strip() and line.split()[0] != "RESIZING"]


def node_states(nodelist: str, *, seconds: float = CALL_SECONDS) -> dict[str, str]:
    """State of each node in sinfo's words (`down*`, `allocated`), in the list's order; empty when Slurm is away."""
    try:
        lines = call("sinfo", "-hN", "-n", nodelist, "-o", "%N %T", seconds=seconds).splitlines()
    except SlurmError:
        return {}
    return {words[0]: words[1] for line in lines if len(words := line.split()) == 2}


def is_lost(state: str) -> bool:
    """Whether a node in this state has failed: `*` says that it does not answer."""
    return state.endswith("*") or state.startswith(("down", "fail", "error", "unknown"))


def exclude(job_id: str, hosts: Iterable[str], *, seconds: float = CALL_SECONDS) -> None:
    """Keeps a pending job off these nodes, and those that it was kept off before."""
    state = job_state(job_id, seconds=seconds)
    before = state.excluded if state is not None else ""
    names = ",".join([*([before] if before else []), *hosts])
    call("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={names}", seconds=seconds)


def step_ids(job_id: str, name: str) -> list[str]:
    """Ids (`12.3`) of a job's running steps of this name."""
    lines = call("squeue", "-h", "-s", "-j", job_id, "-o", "%i %j").splitlines()
    return [words[0] for line in lines if (words := line.split(None, 1))[1:] == [name]]


def signal_step(step_id: str, number: str) -> None:
    call("scancel", "-s", number, step_id)


def cancel(job_id: str) -> None:
    call("scancel", job_id)


def requeue(job_id: str) -> None:
    call("scontrol", "requeue", job_id)


def set_comment(job_id: str, text: str) -> None:
    """What `squeue -o %k` shows."""
    call("scontrol", "update", f"JobId={job_id}", f"Comment={text}")


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for srun inside a job: without the job's defaults for options that every step states itself."""
    keep = ("SLURM_JOB_", "SLURM_CONF", "SLURM_CLUSTER_NAME", "SLURM_RESTART_COUNT")
    named = ("SLURM_JOBID", "SLURM_NODELIST", "SLURM_NNODES")
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith(("SLURM_", "SRUN_", "SBATCH_")) or name.startswith(keep) or name in named
    }


def cpus_per_node(environ: Mapping[str, str] = os.environ) -> int | None:
    """CPUs that the job has on its least node, from `SLURM_JOB_CPUS_PER_NODE` (`64(x3),32`)."""
    text = environ.get("SLURM_JOB_CPUS_PER_NODE", "")
    counts = [int(part.partition("(")[0]) for part in text.split(",") if part]
    return min(counts, default=None)
