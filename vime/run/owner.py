"""Owner of a run folder: the only start of the run whose controller may write to it.

<run>/owner.json    job, restart, host, boot, process and its start; written by the controller, removed at its end
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vime.errors import BadInput, VimeError
from vime.system.files import PRIVATE, read_json, write_json
from vime.system.locks import locked
from vime.system.processes import start_ticks

OWNER, _LOCK = "owner.json", ".owner.lock"
_BOOT = Path("/proc/sys/kernel/random/boot_id")

JobRuns = Callable[[str, int], bool | None]
"""(job, restart) -> True if the scheduler still runs this start of the job; None if unknown."""


@dataclass(frozen=True)
class Owner:
    """One start of a run."""

    job: str
    restart: int
    host: str
    boot: str
    """Kernel's id of the host's boot."""
    pid: int
    pid_start: int
    """Start of the controller's process, in clock ticks since boot."""

    def __str__(self) -> str:
        return f"start {self.restart} of job {self.job} (process {self.pid} on {self.host})"


class Superseded(VimeError):
    """Another start owns the run folder now; this one must no longer write to it."""


def this_start(job: str, restart: int) -> Owner:
    """Owner record of the calling process."""
    pid = os.getpid()
    return Owner(job, restart, socket.gethostname(), _BOOT.read_text().strip(), pid, start_ticks(pid) or 0)


def lives(owner: Owner, me: Owner, job_runs: JobRuns) -> bool | None:
    """True if the recorded start still runs; None if unknown.

    A later start of the same job replaces its predecessor: the scheduler ended that one, or cannot reach it.
    """
    if owner.job == me.job and owner.restart < me.restart:
        return False
    if (owner.host, owner.boot) == (me.host, me.boot):
        return start_ticks(owner.pid) == owner.pid_start
    if owner.host == me.host:
        return False  # the machine has been started again since
    return job_runs(owner.job, owner.restart)


def read_owner(run_dir: str | os.PathLike[str]) -> Owner | None:
    """Recorded owner, or None. A damaged record counts as none, since records are written whole."""
    content = read_json(Path(run_dir) / OWNER)
    try:
        return Owner(**content) if content is not None else None
    except TypeError:
        return None


@contextlib.contextmanager
def owned(run_dir: str | os.PathLike[str], me: Owner, job_runs: JobRuns) -> Iterator[None]:
    """Own the run folder inside the block.

    Raises BadInput without any change while another start runs or may run, OSError if the folder is not writable.
    """
    path = Path(run_dir) / OWNER
    with locked(Path(run_dir) / _LOCK, wait=True):
        other = read_owner(run_dir)
        alive = False if other is None else lives(other, me, job_runs)
        if alive is not False:
            advice = "wait for its end or end it" if alive else f"make sure that it has ended, then remove {path}"
            raise BadInput(f"run folder {run_dir} is in use by {other}: {advice}, or give another --run-dir")
        write_json(path, asdict(me), mode=PRIVATE)
    try:
        yield
    finally:
        # If the disk is gone the record stays, and the next start sees that its process has ended.
        with contextlib.suppress(OSError):
            if read_owner(run_dir) == me:
                path.unlink()


def require_owner(run_dir: str | os.PathLike[str], job: str | None, restart: int) -> None:
    """Raise Superseded if another start owns the folder, for example after a network partition."""
    owner = read_owner(run_dir)
    if owner is not None and (owner.job, owner.restart) != (job, restart):
        raise Superseded(f"start {restart} of job {job} was superseded: {run_dir} belongs to {owner}")
