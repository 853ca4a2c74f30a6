"""Files in the run folder that show controller and nodes to see the same folder."""

from __future__ import annotations

import os
import secrets
import socket
import time

from vime.run.control import control_folder
from vime.system.files import PRIVATE, write_file

_NAME = ".canary"
SEEN_DEADLINE_S = 10.0
"""A network file system may show another node's new file late."""
_POLL_S = 0.1


def release_canary(run_dir: str | os.PathLike[str]) -> str:
    """Writes a new random word and returns it. Called by the controller before the nodes look."""
    folder = control_folder(run_dir)
    for old in folder.glob(f"{_NAME}*"):
        old.unlink(missing_ok=True)
    word = secrets.token_hex(8)
    write_file(folder / _NAME, word, mode=PRIVATE)
    return word


def read_canary(run_dir: str | os.PathLike[str]) -> str | None:
    """Word that this node sees; None where there is none."""
    try:
        return (control_folder(run_dir) / _NAME).read_text()
    except OSError:
        return None


def answer_canary(run_dir: str | os.PathLike[str]) -> None:
    """Writes this node's own file. Raises OSError where it cannot."""
    write_file(control_folder(run_dir) / f"{_NAME}-{socket.gethostname()}", socket.gethostname(), mode=PRIVATE)


def hosts_unseen(run_dir: str | os.PathLike[str], hosts: set[str]) -> set[str]:
    """Hosts whose file does not show up here within the deadline."""
    folder, deadline = control_folder(run_dir), time.monotonic() + SEEN_DEADLINE_S
    while True:
        unseen = hosts - {name.removeprefix(f"{_NAME}-") for name in os.listdir(folder)}
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(_POLL_S)
