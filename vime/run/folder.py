"""Where things are in a run folder, and its private files."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vime.errors import BadInput
from vime.run.plan import Binding, Plan, upgraded

# Names of files in `control/`, by which the controller and training (vime.run.folder) talk.
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


PLAN, BINDING = "plan.json", "binding.json"
Model = TypeVar("Model", bound=BaseModel)


def write_plan(plan: Plan) -> Path:
    """Writes the plan to its run folder, made (0700) when missing. Raises BadInput where it cannot be written."""
    return _write(Path(plan.run_dir) / PLAN, plan)


def read_plan(run_dir: str | os.PathLike[str]) -> Plan:
    """The plan of a run, also of one that an older vime made. Raises BadInput where there is none or it is damaged."""
    return _read(Path(run_dir) / PLAN, Plan, "give a run folder that vime.submit made", _upgraded_plan)


def write_binding(run_dir: str | os.PathLike[str], binding: Binding) -> Path:
    """Writes what the allocation knows."""
    return _write(Path(run_dir) / BINDING, binding)


def read_binding(run_dir: str | os.PathLike[str]) -> Binding:
    """What the allocation knows. Raises BadInput before the controller has written it."""
    return _read(Path(run_dir) / BINDING, Binding, "the controller writes it after preflight; look at vime.status")


def _write(path: Path, content: BaseModel) -> Path:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp makes the file 0600; the rename shows readers the old file or the new one, never a part.
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content.model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}: give a run folder that you may write to") from error
    return path


def _read(path: Path, model: type[Model], advice: str, upgrade: Callable[[str], str] = str) -> Model:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"there is no {path}: {advice}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    try:
        return model.model_validate_json(upgrade(text))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise BadInput(f"{path} is not one of this version of vime: {place}: {problem['msg']}") from error


def _upgraded_plan(text: str) -> str:
    try:
        values = json.loads(text)
    except ValueError:
        # Validation says what is wrong with it.
        return text
    return json.dumps(upgraded(values)) if isinstance(values, dict) else text


def checkpoint_requested(run_dir: str | Path) -> bool:
    """Whether the controller has asked for a checkpoint and the end of training."""
    return (Path(run_dir) / "control" / CHECKPOINT_REQUEST).exists()


def answer_checkpoint(run_dir: str | Path, rollout_id: int, path: str) -> None:
    """Tell the controller that the checkpoint is published; the answer appears whole or not at all."""
    folder = Path(run_dir) / "control"
    partial = folder / f".{CHECKPOINT_DONE}.partial"
    partial.write_text(json.dumps({"rollout_id": rollout_id, "path": path, "time": time.time()}))
    os.replace(partial, folder / CHECKPOINT_DONE)
