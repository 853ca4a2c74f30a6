"""What a dead job's processes left on this node: processes that outlived their supervisor, and shared memory.

Called by whoever holds the lock of the job's node-local folder alone (vime.launch.nodetmp): then no task of the job
lives here. Only what belongs to this user is looked at.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

OWNER = "VIME_STAGE_OF_JOB"
"""Environment variable of everything that a stage's command starts; supervisors and launchers do not have it."""
SHARED_MEMORY = Path("/dev/shm")
_SEGMENTS = ("vime-", "psm_", "torch_", "sem.mp-", "nccl-", "plasma", "ray")
"""Names that vime, Python and vLLM, torch, NCCL and Ray give to segments."""
_END_S = 5.0


def remove(job: str, since_ns: int) -> None:
    """Ends the processes of a dead job, then removes segments made after `since_ns` (Unix time) that nobody uses."""
    kill_processes(job)
    segments = [path for path, status in _own_segments() if status.st_ctime_ns >= since_ns]
    if segments:
        used = _files_in_use()
        for path, status in _own_segments():
            if path in segments and (status.st_dev, status.st_ino) not in used:
                path.unlink(missing_ok=True)


def kill_processes(job: str) -> int:
    """SIGKILL to every process of this user that a stage of the job started; how many there were.

    Waits for their ends, at most `_END_S` seconds: one that is ending has no environment any more, but open files.
    """
    mark, deadline, killed = f"{OWNER}={job}".encode(), time.monotonic() + _END_S, set()
    while time.monotonic() < deadline:
        found = [pid for pid in _own_processes() if _is_marked(pid, mark)]
        if not found:
            break
        ending: list[int] = []
        for pid in found:
            # The descriptor holds the process that is looked at, whoever gets its number later.
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                ending.append(descriptor)
                if _is_marked(pid, mark):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed.add(pid)
        for descriptor in ending:
            select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            os.close(descriptor)
    return len(killed)


def _own_processes() -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # A process may end while the folder is read.
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid():
                    yield int(entry.name)


def _is_marked(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        # It has ended, or it has changed its user and is not ours any more.
        return False


def _own_segments() -> Iterator[tuple[Path, os.stat_result]]:
    for entry in os.scandir(SHARED_MEMORY):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(_SEGMENTS) and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                yield Path(entry.path), status


def _files_in_use() -> set[tuple[int, int]]:
    """(device, inode) of what processes of this user have mapped or open.

    Not their paths: a semaphore is mapped under a temporary name and gets its own by a link.
    """
    used: set[tuple[int, int]] = set()
    for pid in [*_own_processes(), os.getpid()]:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                device, inode = line.split(None, 5)[3:5]
                if inode != "0":
                    used.add((os.makedev(*(int(part, 16) for part in device.split(":"))), int(inode)))
            for entry in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    status = os.stat(entry.path)
                    used.add((status.st_dev, status.st_ino))
    return used
