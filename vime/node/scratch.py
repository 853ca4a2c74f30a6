"""The job's folder for node-local files: shared by its tasks on a node, removed by the last of them or by the next run.

Every task holds a shared lock on the folder while it lives, so whoever gets the lock alone knows that nobody uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from vime.errors import BadInput
from vime.node import leftovers
from vime.run.node_local import base_folder
from vime.system.private import private_folder, shared_parents

_LOCK = ".lock"


class NodeFolder:
    """A task's hold on its job's folder on this node."""

    def __init__(self, job: str) -> None:
        """Makes the folder (0700) and takes the shared lock."""
        base = base_folder()
        shared_parents(base)
        if base.is_symlink():
            raise BadInput(f"{base} is a link: remove it, or set VIME_NODE_TMP to another folder")
        try:
            self.path = private_folder(base) / job
        except BadInput as error:
            raise BadInput(f"{error}; VIME_NODE_TMP names another place for node-local files") from error
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._descriptor = _open_lock(self.path, os.O_CREAT)
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
                if os.fstat(self._descriptor).st_nlink:
                    return
                os.close(self._descriptor)  # the task before removed the folder meanwhile

    def leave(self) -> None:
        """Gives the folder up; the last task of the job on this node removes it."""
        os.close(self._descriptor)
        remove_unused(self.path)


def remove_unused(folder: Path) -> bool:
    """Removes a job's folder, and what else its processes left here, unless a task holds it."""
    try:
        descriptor = _open_lock(folder, 0)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        leftovers.remove(folder.name, os.fstat(descriptor).st_ctime_ns)
        # The lock goes first: a task that waits for it sees that and makes a new folder.
        (folder / _LOCK).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


def remove_dead() -> list[str]:
    """Removes what killed runs of this user left on this node; their jobs' names."""
    base = base_folder()
    if not base.is_dir():
        return []
    return [folder.name for folder in sorted(base.iterdir()) if folder.is_dir() and remove_unused(folder)]


def _open_lock(folder: Path, flags: int) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
