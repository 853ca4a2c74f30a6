"""Tokens of one start of a run, required from callers of Ray and the engines and from ranks that join a group: files
0600 in `<run>/secrets` (0700)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from vime.errors import BadInput
from vime.system.files import PRIVATE, write_file
from vime.system.private import private_folder

RAY_TOKEN, API_KEY, GROUP_KEY, METRICS_KEY = "ray_token", "api_key", "group_key", "metrics_key"
TOKENS = (RAY_TOKEN, API_KEY, GROUP_KEY, METRICS_KEY)
GROUP_KEY_FILE = "VIME_GROUP_KEY_FILE"
"""Variable with the path of the group key, for the tasks of a run."""


def token_path(run_dir: str | os.PathLike[str], name: str) -> Path:
    """File of a token."""
    return Path(run_dir) / "secrets" / name


def make_tokens(run_dir: str | os.PathLike[str]) -> None:
    """Make new tokens for this start of the run, replacing earlier ones."""
    folder = private_folder(Path(run_dir) / "secrets")
    for name in TOKENS:
        write_file(folder / name, secrets.token_hex(32) + "\n", mode=PRIVATE)


def read_token(run_dir: str | os.PathLike[str], name: str) -> str:
    """Read a token of the run. Raises BadInput if it is missing or others may read it."""
    return _read(token_path(run_dir, name))


def group_key(environ: Mapping[str, str]) -> bytes | None:
    """Key of the process groups of the run that this task belongs to; None outside of a run. Raises BadInput."""
    path = environ.get(GROUP_KEY_FILE)
    return _read(Path(path)).encode() if path else None


def _read(path: Path) -> str:
    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read().strip()
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}: the controller makes it when the run starts") from error
    if mode & 0o077:
        raise BadInput(f"{path} can be read by others (mode {mode & 0o777:o}): remove it and submit again")
    return token
