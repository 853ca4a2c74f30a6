"""Processes of this user on this machine. The one module that reads /proc/PID and calls prctl; Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PARENT_VARIABLE = "VIME_PARENT_PID"
"""Environment variable with the pid whose end a server follows."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Process:
    """A live process."""

    pid: int
    parent: int
    group: int
    start: int
    """Clock ticks since boot; with the pid it names one process."""


def adopt_orphans() -> None:
    """Makes this process the parent of any descendant that loses its own: a detached daemon stays a descendant."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def signal_on_parent_end(number: signal.Signals) -> None:
    """Has the kernel send this process a signal when its parent ends; the caller checks for an earlier end."""
    _prctl(_PR_SET_PDEATHSIG, number)


def end_with_parent(parent: int) -> None:
    """Has this process receive SIGTERM when its parent ends. Raises SystemExit if it has ended already."""
    signal_on_parent_end(signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(f"the process {parent} that started this server has ended")


def find_process(pid: int) -> Process | None:
    """A live process; None for one that ended, also while its parent has not collected it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if not fields or fields[0] in "ZX" else Process(pid, int(fields[1]), int(fields[2]), int(fields[19]))


def all_processes() -> Iterator[Process]:
    """Live processes of every user that this process may see."""
    return (process for pid in _pids() if (process := find_process(pid)) is not None)


def start_ticks(pid: int) -> int | None:
    """Start of a live process, in clock ticks since boot; None for one that ended."""
    process = find_process(pid)
    return None if process is None else process.start


def started_at(pid: int) -> float | None:
    """Unix time of a live process's start; None for one that ended."""
    ticks = start_ticks(pid)
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return None if ticks is None else booted + ticks / os.sysconf("SC_CLK_TCK")


def descendants(root: int) -> list[int]:
    """Live processes below a process, without it."""
    parents = {process.pid: process.parent for process in all_processes()}
    found, level = [], {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found.extend(level)
    return found


def kill_tree(root: int, number: signal.Signals) -> int:
    """Signals every process below `root`; returns their number."""
    below = descendants(root)
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(below)


def group_runs(group: int) -> bool:
    """True while the process group has a live member."""
    return any(process.group == group for process in all_processes())


def own_processes() -> Iterator[int]:
    """Every other process of this user."""
    for pid in _pids():
        # A process may end while the folder is read.
        with contextlib.suppress(OSError):
            if pid != os.getpid() and os.stat(f"/proc/{pid}").st_uid == os.getuid():
                yield pid


def environment_of(pid: int) -> list[bytes]:
    """`NAME=value` entries with which a process started; empty for one that ended or changed its user."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def files_in_use() -> set[tuple[int, int]]:
    """(device, inode) of files that processes of this user have mapped or open.

    Paths would not do: a semaphore is mapped under a temporary name and gets its own by a link.
    """
    used: set[tuple[int, int]] = set()
    for pid in [*own_processes(), os.getpid()]:
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


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
