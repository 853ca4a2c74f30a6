"""Logs that keep a bounded number of their newest bytes: the file itself and the one before it, `<name>.1`."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

MOST_BYTES = 256 * 2**20
"""Size at which a log begins anew; with the one before it a log takes at most twice as much."""


def earlier(path: Path) -> Path:
    """File with the lines before those of a log."""
    return path.with_name(f"{path.name}.1")


class BoundedLog:
    """Appends to a log of its own. Errors of the file system are OSError."""

    def __init__(self, path: Path, most: int = MOST_BYTES) -> None:
        self._path, self._most = path, most
        self._descriptor, self._size = -1, 0

    def write(self, data: bytes) -> None:
        """Append whole lines; the file is made on the first."""
        if self._size >= self._most:
            self.close()
            os.replace(self._path, earlier(self._path))
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._descriptor).st_size
        self._size += os.write(self._descriptor, data)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._size = 0


def cut_back(path: Path, most: int = MOST_BYTES) -> None:
    """Begin a log anew that another process has open for appending; lines written in this moment may be lost.

    Does nothing to a smaller log, or where the file system refuses.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size >= most:
            shutil.copyfile(path, earlier(path))
            earlier(path).chmod(0o600)
            os.truncate(path, 0)
