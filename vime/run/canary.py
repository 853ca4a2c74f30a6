"""Files in the run folder that prove that controller and nodes see the same folder.

The nodes get the controller's word through `CANARY` too, so that each knows what it must find.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

from vime.run.control import control_folder
from vime.system.files import PRIVATE, write_file
from vime.system.visible import names_in, patience_s

CANARY = "VIME_CANARY"
"""Environment variable of a task: the word written by the controller."""
_NAME = ".canary"
SEEN_DEADLINE_S = 10.0
"""Shortest wait for a file from another machine."""
_POLL_S = 0.1


def release_canary(run_dir: str | os.PathLike[str]) -> str:
    """Write a new random word and return it. Called by the controller before the nodes look."""
    folder = control_folder(run_dir)
    for old in folder.glob(f"{_NAME}*"):
        old.unlink(missing_ok=True)
    word = secrets.token_hex(8)
    write_file(folder / _NAME, word, mode=PRIVATE)
    return word


def read_canary(run_dir: str | os.PathLike[str], expected: str | None = None) -> str | None:
    """Word that this node sees, or None. Waits for `expected`, which may become visible late."""
    path = control_folder(run_dir) / _NAME
    deadline = time.monotonic() + (0.0 if expected is None else max(SEEN_DEADLINE_S, patience_s(path)))
    while (word := _read(path)) != expected and time.monotonic() < deadline:
        names_in(path.parent)
        time.sleep(_POLL_S)
    return word


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def answer_canary(run_dir: str | os.PathLike[str]) -> None:
    """Write this node's own file. Raises OSError on failure."""
    write_file(_answer(run_dir, socket.gethostname()), socket.gethostname(), mode=PRIVATE)


def hosts_unseen(run_dir: str | os.PathLike[str], hosts: set[str]) -> set[str]:
    """Hosts whose file stays invisible here, even after the file system's delay for files of other machines."""
    folder = control_folder(run_dir)
    deadline = time.monotonic() + max(SEEN_DEADLINE_S, patience_s(folder))
    while True:
        # The listing may be stale, but looking up a name before it exists would cache it as missing.
        listed = names_in(folder)
        unseen = {host for host in hosts if _answer(run_dir, host).name not in listed}
        unseen = {host for host in unseen if not _answer(run_dir, host).exists()}
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(_POLL_S)


def _answer(run_dir: str | os.PathLike[str], host: str) -> Path:
    return control_folder(run_dir) / f"{_NAME}-{host}"
