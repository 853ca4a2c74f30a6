"""Files in the run folder that show controller and nodes to see the same folder.

The controller's word travels to the nodes in `CANARY` too, so that a node knows what it has to find.
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
"""Environment variable of a task: the word that the controller has written."""
_NAME = ".canary"
SEEN_DEADLINE_S = 10.0
"""Shortest wait for a file of another machine."""
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
    """Word that this node sees; None where there is none. Waits for `expected`, which may become visible late."""
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
    """Write this node's own file. Raises OSError where it cannot."""
    write_file(_answer(run_dir, socket.gethostname()), socket.gethostname(), mode=PRIVATE)


def hosts_unseen(run_dir: str | os.PathLike[str], hosts: set[str]) -> set[str]:
    """Hosts whose file does not show up here, however late the file system shows files of other machines."""
    folder = control_folder(run_dir)
    deadline = time.monotonic() + max(SEEN_DEADLINE_S, patience_s(folder))
    while True:
        # A name that was never looked up is not remembered as missing, and a listing may be old.
        listed = names_in(folder)
        unseen = {host for host in hosts if _answer(run_dir, host).name not in listed}
        unseen = {host for host in unseen if not _answer(run_dir, host).exists()}
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(_POLL_S)


def _answer(run_dir: str | os.PathLike[str], host: str) -> Path:
    return control_folder(run_dir) / f"{_NAME}-{host}"
