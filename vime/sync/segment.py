"""Private shared memory for one user's processes on one node: files of mode 0600 in the memory file system."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import re
import stat
from pathlib import Path

from vime.errors import BadInput, VimeError

DIRECTORY = Path("/dev/shm")
_NAME = re.compile(r"vime-[0-9a-f]{16}-n\d+-r\d+-s\d+")


class SegmentError(VimeError):
    """Shared memory is missing, owned by another user, or open to others."""


def segment_name(run: str, node: int, receiver: int, buffer: int) -> str:
    """Name of a segment: equal on every rank of a run, different between runs."""
    return f"vime-{hashlib.sha256(run.encode()).hexdigest()[:16]}-n{node}-r{receiver}-s{buffer}"


class Segment:
    """Mapped shared memory. Its creator removes the name; the memory is freed with the last mapping."""

    def __init__(self, name: str, memory: mmap.mmap) -> None:
        self.name = name
        self.memory = memory

    @classmethod
    def create(cls, name: str, size: int) -> Segment:
        """Create a segment of `size` bytes with all pages allocated, replacing a crashed run's of the same name.

        Raises BadInput without room, SegmentError if the existing file is not private to this user.
        """
        path = _path(name)
        with contextlib.suppress(FileNotFoundError):
            _check(path, os.lstat(path))
            path.unlink()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            # If pages were allocated on first write, a full file system would kill the process.
            os.posix_fallocate(descriptor, 0, max(1, size))
            return cls(name, _map_to_write(descriptor, max(1, size)))
        except OSError as error:
            path.unlink()
            if error.errno == errno.ENOSPC:
                raise BadInput(
                    f"{DIRECTORY} has no room for {size} bytes of weights: give a smaller --update-weight-buffer-size"
                ) from error
            raise
        finally:
            os.close(descriptor)

    @classmethod
    def open(cls, name: str, *, write: bool = False) -> Segment:
        """Map a segment that another process of the same user created. Raises SegmentError for any other file."""
        path = _path(name)
        try:
            descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW)
        except OSError as error:
            raise SegmentError(f"cannot open the shared memory {path}: {error.strerror}") from error
        try:
            _check(path, os.fstat(descriptor))
            if write:
                return cls(name, _map_to_write(descriptor, os.fstat(descriptor).st_size))
            # A private copy-on-write mapping: torch wants a writable buffer, and writes here reach nobody else.
            return cls(name, mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
        finally:
            os.close(descriptor)

    def unlink(self) -> None:
        """Remove the name; existing mappings keep the memory."""
        with contextlib.suppress(FileNotFoundError):
            _path(self.name).unlink()


def _map_to_write(descriptor: int, size: int) -> mmap.mmap:
    """Map all pages at once: a fault for each page would take longer than filling it."""
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise SegmentError(f"{name!r} is not the name of a weight segment")
    return DIRECTORY / name


def _check(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise SegmentError(f"{path} is not a private file of this user: somebody else made it, remove it")
