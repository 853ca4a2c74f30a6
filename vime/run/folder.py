"""Paths in a run folder, and its plan and binding."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vime.errors import BadInput
from vime.run.plan import Binding, Plan, upgraded
from vime.system.files import PRIVATE, write_file
from vime.system.private import private_folder, read_own, require_own_folder, shared_parents

PLAN, BINDING = "plan.json", "binding.json"
Model = TypeVar("Model", bound=BaseModel)


def make_run_folder(run_dir: str | os.PathLike[str]) -> Path:
    """Make the run folder, private from the start, and return it. Raises BadInput if another user owns it."""
    folder = Path(run_dir)
    try:
        shared_parents(folder)
        return private_folder(folder)
    except OSError as error:
        raise BadInput(f"cannot make {folder}: {error.strerror}: give a run folder that you may write to") from error


def log_folder(run_dir: str | os.PathLike[str], stage: str) -> Path:
    return Path(run_dir) / "logs" / stage


def task_log(run_dir: str | os.PathLike[str], stage: str, node: int, rank: int, tasks_per_node: int) -> Path:
    """`node00.log`, or `node00.rank3.log` if several tasks share a node."""
    name = f"node{node:02d}.log" if tasks_per_node == 1 else f"node{node:02d}.rank{rank}.log"
    return log_folder(run_dir, stage) / name


def launcher_log(run_dir: str | os.PathLike[str], stage: str) -> Path:
    """Log of srun itself."""
    return log_folder(run_dir, stage) / "launcher.log"


def write_plan(plan: Plan) -> Path:
    """Write the plan to its run folder, made (0700) if missing. Raises BadInput if it cannot be written."""
    return _write(Path(plan.run_dir) / PLAN, plan)


def read_plan(run_dir: str | os.PathLike[str]) -> Plan:
    """Plan of a run, also of one made by an older vime. Raises BadInput if it is missing or damaged."""
    return _read(Path(run_dir) / PLAN, Plan, "give a run folder that vime.submit made", _upgraded_plan)


def write_binding(run_dir: str | os.PathLike[str], binding: Binding) -> Path:
    """Write the hosts, addresses and ports of the allocation."""
    return _write(Path(run_dir) / BINDING, binding)


def read_binding(run_dir: str | os.PathLike[str]) -> Binding:
    """Binding of the current start. Raises BadInput before the controller has written it.

    A task received the binding of its start in `BINDING_VARIABLE`. The file wins only if it is a later one of the
    same start: a client of a network file system may show none, or an earlier one, for up to a minute.
    """
    handed = handed_binding(run_dir)
    try:
        written = _read(
            Path(run_dir) / BINDING, Binding, "the controller writes it after preflight; look at vime.status"
        )
    except BadInput:
        if handed is None:
            raise
        return handed
    if handed is None:
        return written
    same_start = (written.job_id, written.restart) == (handed.job_id, handed.restart)
    return written if same_start and written.version > handed.version else handed


def find_binding(run_dir: str | os.PathLike[str]) -> Binding | None:
    """As `read_binding`, but None before the controller has written it. Raises BadInput if it is damaged."""
    if handed_binding(run_dir) is None and not (Path(run_dir) / BINDING).exists():
        return None
    return read_binding(run_dir)


BINDING_VARIABLE = "VIME_BINDING"
"""Environment variable of a task: run folder and binding, compressed."""


def binding_text(run_dir: str | os.PathLike[str], binding: Binding) -> str:
    """Value of `BINDING_VARIABLE`: 5 kB for 1000 nodes; the system's limit is 128 kB."""
    content = json.dumps({"run_dir": os.fspath(run_dir), "binding": binding.model_dump()})
    return base64.b64encode(zlib.compress(content.encode())).decode()


def handed_binding(run_dir: str | os.PathLike[str]) -> Binding | None:
    """Binding in this process's environment; None outside of tasks, and for another run."""
    text = os.environ.get(BINDING_VARIABLE)
    if not text:
        return None
    content = json.loads(zlib.decompress(base64.b64decode(text)))
    return Binding(**content["binding"]) if content["run_dir"] == os.fspath(run_dir) else None


def _write(path: Path, content: BaseModel) -> Path:
    try:
        make_run_folder(path.parent)
        write_file(path, content.model_dump_json(indent=1) + "\n", mode=PRIVATE)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}: give a run folder that you may write to") from error
    return path


def _read(path: Path, model: type[Model], advice: str, upgrade: Callable[[str], str] = str) -> Model:
    try:
        text = read_own(path).decode("utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"there is no {path}: {advice}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    require_own_folder(path.parent)
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
        # Validation reports the error.
        return text
    return json.dumps(upgraded(values)) if isinstance(values, dict) else text
