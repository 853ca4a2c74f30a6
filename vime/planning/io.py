"""`plan.json` and `binding.json` in the run folder: written whole or not at all, readable by their owner alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from vime.errors import BadInput
from vime.planning.types import Binding, Plan

PLAN, BINDING = "plan.json", "binding.json"
Model = TypeVar("Model", bound=BaseModel)


def write_plan(plan: Plan) -> Path:
    """Writes the plan to its run folder, made (0700) when missing. Raises BadInput where it cannot be written."""
    return _write(Path(plan.run_dir) / PLAN, plan)


def read_plan(run_dir: str | os.PathLike[str]) -> Plan:
    """The plan of a run. Raises BadInput where there is none or it is not of this version of vime."""
    return _read(Path(run_dir) / PLAN, Plan, "give a run folder that vime.submit made")


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


def _read(path: Path, model: type[Model], advice: str) -> Model:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BadInput(f"there is no {path}: {advice}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise BadInput(f"{path} is not one of this version of vime: {place}: {problem['msg']}") from error
