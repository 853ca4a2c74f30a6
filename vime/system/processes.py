"""Processes of this user on this machine: /proc and prctl, which nothing else in vime speaks to."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def adopt_orphans() -> None:
    """Makes this process the parent of whatever below it loses its own: a daemon that detaches stays a descendant."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def parent_pids() -> dict[int, int]:
    """Parent of every process that is seen here."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            # A process may end while the folder is read.
            with contextlib.suppress(OSError, IndexError):
                state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents[int(entry.name)] = int(parent)
    return parents


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with its pid it names one process. None when gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def descendants(root: int) -> list[int]:
    """Live processes below a process, without it."""
    parents = parent_pids()
    found, level = [], {root}
    while level:
        level = {pid for pid, parent in parents.items() if parent in level}
        found.extend(level)
    return found


def kill_tree(root: int, number: signal.Signals) -> int:
    """Signals every process below `root`; how many there were."""
    below = descendants(root)
    for pid in below:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(below)


def own_processes() -> Iterator[int]:
    """Every other process of this user."""
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            # A process may end while the folder is read.
            with contextlib.suppress(OSError):
                if entry.stat().st_uid == os.getuid():
                    yield int(entry.name)


PARENT_VARIABLE = "VIME_PARENT_PID"


_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel send SIGTERM when the parent ends, and end at once if it already has. Linux only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        raise SystemExit(f"the process {parent} that started this server has ended")
