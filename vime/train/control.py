"""Requests from the controller to the running driver, as files in `<run>/control/`: they outlive either process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

CHECKPOINT_REQUEST = "checkpoint-request"
CHECKPOINT_DONE = "checkpoint-done"


def checkpoint_requested(run_dir: str | Path) -> bool:
    """Whether the controller has asked for a checkpoint and the end of training."""
    return (Path(run_dir) / "control" / CHECKPOINT_REQUEST).exists()


def answer_checkpoint(run_dir: str | Path, rollout_id: int, path: str) -> None:
    """Tell the controller that the checkpoint is published; the answer appears whole or not at all."""
    folder = Path(run_dir) / "control"
    partial = folder / f".{CHECKPOINT_DONE}.partial"
    partial.write_text(json.dumps({"rollout_id": rollout_id, "path": path, "time": time.time()}))
    os.replace(partial, folder / CHECKPOINT_DONE)
