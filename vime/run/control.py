"""Files in `control/` of a run folder, through which controller and training communicate."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from vime.system.files import PRIVATE, write_file
from vime.system.visible import appears, names_in

CONTROL_FOLDER = "control"
_REQUEST, _DONE = "checkpoint-request", "checkpoint-done"


def control_folder(run_dir: str | os.PathLike[str]) -> Path:
    """`<run>/control`."""
    return Path(run_dir) / CONTROL_FOLDER


def request_checkpoint(run_dir: str | os.PathLike[str]) -> None:
    """Ask training to save a checkpoint and end. Called by the controller."""
    write_file(control_folder(run_dir) / _REQUEST, "", mode=PRIVATE)


def checkpoint_requested(run_dir: str | os.PathLike[str]) -> bool:
    """True once the controller has asked for a checkpoint and the end of training.

    Reads the folder's listing, since a client may cache a name's absence from the previous call.
    """
    return _REQUEST in names_in(control_folder(run_dir))


def answer_checkpoint(run_dir: str | os.PathLike[str], rollout_id: int, path: str) -> None:
    """Report the published checkpoint to the controller. Called by training."""
    answer = json.dumps({"rollout_id": rollout_id, "path": path, "time": time.time()})
    write_file(control_folder(run_dir) / _DONE, answer, mode=PRIVATE)


def checkpoint_answer(run_dir: str | os.PathLike[str]) -> str | None:
    """Answer of training, JSON of rollout_id, path and time (Unix seconds); None before it arrives."""
    path = control_folder(run_dir) / _DONE
    return path.read_text(encoding="utf-8") if _DONE in names_in(path.parent) and appears(path) else None


def withdraw_request(run_dir: str | os.PathLike[str]) -> None:
    """Remove request and answer, so that a new start does not mistake an earlier one's for its own."""
    for name in (_REQUEST, _DONE):
        (control_folder(run_dir) / name).unlink(missing_ok=True)
