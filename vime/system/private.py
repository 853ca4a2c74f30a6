"""Folders and files that are this user's own, and that nobody else can write to.

Code, plans and pickles of a run are executed as its owner: whoever can write to one of them could run anything.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from vime.errors import BadInput

PRIVATE_FOLDER = 0o700
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_SHARED_FOLDER = 0o1777


def private_folder(path: Path) -> Path:
    """Makes a folder and its missing parents with mode 0700, whatever the umask; returns it.

    One that exists is taken, with its mode set to 0700, if it is this user's own and if nobody else could write to it
    or it is empty. Raises BadInput for any other, and OSError where it cannot be made.
    """
    if not path.parent.exists():
        private_folder(path.parent)
    try:
        os.mkdir(path, PRIVATE_FOLDER)
    except FileExistsError:
        require_own_folder(path, write_by_others=path.is_dir() and not os.listdir(path))
    status = path.stat()
    if stat.S_IMODE(status.st_mode) != PRIVATE_FOLDER:
        path.chmod(PRIVATE_FOLDER)
    return path


def shared_parents(path: Path) -> None:
    """Makes the missing parents of a folder. The umask says who may write there, and nobody can replace another's."""
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=_SHARED_FOLDER, exist_ok=True)


def require_own_folder(path: Path, *, write_by_others: bool = False) -> None:
    """Raises BadInput unless a folder, and the link to it, is this user's own and others cannot write to it.

    `write_by_others` accepts that they can.
    """
    if path.is_symlink() and path.lstat().st_uid != os.geteuid():
        raise BadInput(f"{path} is a link of another user (uid {path.lstat().st_uid}): give a folder of your own")
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f"cannot open the folder {path}: {error.strerror}: give another") from error
    if not stat.S_ISDIR(status.st_mode):
        raise BadInput(f"{path} is not a folder: give another")
    _require_own(path, status, write_by_others=write_by_others)


def read_own(path: Path) -> bytes:
    """Content of a file of this user that others cannot write to. Raises BadInput for any other, else OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(file, "rb") as stream:
        _require_own(path, os.fstat(file), write_by_others=False)
        return stream.read()


def _require_own(path: Path, status: os.stat_result, *, write_by_others: bool) -> None:
    if status.st_uid != os.geteuid():
        raise BadInput(f"{path} belongs to another user (uid {status.st_uid}), who could run code as you: use your own")
    if status.st_mode & _OTHERS_WRITE and not write_by_others:
        raise BadInput(
            f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}), who could run code as you: "
            f"if its content is yours, chmod go-w {path}, else take a new folder"
        )
