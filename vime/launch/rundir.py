"""Where things are in a run folder, and its private files."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from vime.errors import BadInput

# Names of files in `control/`, by which the controller and training (vime.train.control) talk.
CHECKPOINT_REQUEST, CHECKPOINT_DONE = "checkpoint-request", "checkpoint-done"
SECRETS = ("ray_token", "api_key")


def log_folder(run_dir: str | os.PathLike[str], stage: str) -> Path:
    return Path(run_dir) / "logs" / stage


def task_log(run_dir: str | os.PathLike[str], stage: str, node: int, rank: int, tasks_per_node: int) -> Path:
    """`node00.log`, or `node00.rank3.log` where several tasks share a node."""
    name = f"node{node:02d}.log" if tasks_per_node == 1 else f"node{node:02d}.rank{rank}.log"
    return log_folder(run_dir, stage) / name


def launcher_log(run_dir: str | os.PathLike[str], stage: str) -> Path:
    """What srun itself says."""
    return log_folder(run_dir, stage) / "launcher.log"


def secret_path(run_dir: str | os.PathLike[str], name: str) -> Path:
    return Path(run_dir) / "secrets" / name


def read_secret(run_dir: str | os.PathLike[str], name: str) -> str:
    """A token of the run. Raises BadInput where it is missing or others may read it."""
    path = secret_path(run_dir, name)
    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read().strip()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}: the controller makes it when the run starts") from error
    if mode & 0o077:
        raise BadInput(f"{path} can be read by others (mode {mode & 0o777:o}): remove it and submit again")
    return token


def make_secrets(run_dir: str | os.PathLike[str]) -> None:
    """New tokens for this start of the run: 0600 in a folder of 0700."""
    folder = Path(run_dir) / "secrets"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in SECRETS:
        partial = folder / f".{name}.partial"
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
        os.replace(partial, folder / name)
