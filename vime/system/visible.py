"""Files that another machine has written to a shared file system, which a client may show late.

An NFS client with default options keeps attributes of folders, and names that it did not find, for up to a minute
(acdirmax). Opening a folder makes it ask the server, so a listing is newer than a lookup.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

LATE_S = 65.0
"""After this many seconds every client shows what was written: acdirmax of NFS, and some."""
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay", "f2fs", "squashfs"})
"""File systems that no other machine writes to."""
_POLL_S = 0.1


def file_system(path: str | os.PathLike[str]) -> str:
    """Type of the file system of a path, or of its nearest parent that exists; empty where it is not known."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    device = place.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""


def patience_s(path: str | os.PathLike[str]) -> float:
    """Seconds after which a file of another machine is visible at a path: 0 on a file system of this machine alone."""
    return 0.0 if file_system(path) in _LOCAL else LATE_S


def names_in(folder: str | os.PathLike[str]) -> set[str]:
    """Names in a folder as its server has them; empty where there is no such folder."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def appears(path: str | os.PathLike[str], seconds: float | None = None) -> bool:
    """Whether a path is there, or shows up within `seconds` (default: `patience_s` of it)."""
    seconds = patience_s(path) if seconds is None else seconds
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() >= deadline:
            return False
        names_in(os.path.dirname(os.path.abspath(path)))
        time.sleep(_POLL_S)
    return True
