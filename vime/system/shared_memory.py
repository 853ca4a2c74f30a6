"""Shared-memory segments that killed processes of this user left on this node.

A killed process does not unlink its segments, and nobody else knows their names. They are found by the prefixes that
vime and the libraries below it use, by their time of creation, and by no process holding them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from vime.system.processes import files_in_use

FOLDER = Path("/dev/shm")
NAMES = ("vime-", "psm_", "vllm_", "torch_", "sem.mp-", "nccl-", "plasma", "ray")
"""Prefixes of segment names: of vime, Python, vLLM, torch, NCCL and Ray."""


def remove_unused(since_ns: int, names: tuple[str, ...] = NAMES) -> None:
    """Removes this user's segments made after `since_ns` (Unix time) that no process has open or mapped.

    `names`: prefixes of their names.
    """
    segments = [path for path, status in _own_segments(names) if status.st_ctime_ns >= since_ns]
    if segments:
        used = files_in_use()
        for path, status in _own_segments(names):
            if path in segments and (status.st_dev, status.st_ino) not in used:
                path.unlink(missing_ok=True)


def _own_segments(names: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in os.scandir(FOLDER):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.startswith(names) and stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid():
                yield Path(entry.path), status
