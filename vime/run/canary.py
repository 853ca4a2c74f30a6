"""Files in the run folder by which controller and nodes see that they mean the same folder."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

_NAME = ".canary"
SEEN_DEADLINE_S = 10.0
"""A network file system may show another node's new file late."""
_POLL_S = 0.1


def release_canary(run_dir: str | os.PathLike[str]) -> str:
    """Called by the controller before the nodes look: writes a new secret word, and returns it."""
    folder = Path(run_dir) / "control"
    for old in folder.glob(f"{_NAME}*"):
        old.unlink(missing_ok=True)
    word = secrets.token_hex(8)
    (folder / _NAME).write_text(word)
    return word


def read_canary(run_dir: str | os.PathLike[str]) -> str | None:
    """The word as this node sees it; None where there is none."""
    try:
        return (Path(run_dir) / "control" / _NAME).read_text()
    except OSError:
        return None


def answer_canary(run_dir: str | os.PathLike[str]) -> None:
    """Writes this node's own file. Raises OSError where it cannot."""
    (Path(run_dir) / "control" / f"{_NAME}-{socket.gethostname()}").write_text(socket.gethostname())


def hosts_unseen(run_dir: str | os.PathLike[str], hosts: set[str]) -> set[str]:
    """Hosts whose file does not show up here in time."""
    folder, deadline = Path(run_dir) / "control", time.monotonic() + SEEN_DEADLINE_S
    while True:
        unseen = hosts - {name.removeprefix(f"{_NAME}-") for name in os.listdir(folder)}
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(_POLL_S)
