"""Segments of shared memory that processes of this user left on this node.

A killed process does not unlink its segments, and nobody else knows their names: they are found by the names that
vime and the libraries below it give, by when they were made, and by nobody holding them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vime.system.processes import own_processes

FOLDER = Path("/dev/shm")
NAMES = ("vime-", "psm_", "vllm_", "torch_", "sem.mp-", "nccl-", "plasma", "ray")
"""What vime, Python, vLLM, torch, NCCL and Ray begin the names of segments with."""


def remove_unused(since_ns: int, names: tuple[str, ...] = NAMES) -> None:
    """Removes the segments of this user made after `since_ns` (Unix time) that no process has open or mapped.

    `names`: what their names begin with.
    """
    segments = [path for path, status in _own_segments(names) if status.st_ctime_ns >= since_ns]
    if segments:
        used = _files_in_use()
        for path, status in _own_segments(names):
            if path in segments and (status.st_dev, status.st_ino) not in used:
                path.unlink(missing_ok=True)


def _own_segments(names: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in os.scandir(FOLDER):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(names) and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                yield Path(entry.path), status


def _files_in_use() -> set[tuple[int, int]]:
    """(device, inode) of what processes of this user have mapped or open.

    Not their paths: a semaphore is mapped under a temporary name and gets its own by a link.
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
