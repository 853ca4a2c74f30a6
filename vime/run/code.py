"""Code of a queued run: a copy of the working tree in the run folder, so that later edits do not change the run.

Only a checkout is copied; packages installed by pip do not change during a run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from vime.errors import BadInput
from vime.recipe.schema import Recipe
from vime.system.files import publish_folder
from vime.system.private import private_folder

CODE_FOLDER = "code"
_CHECKOUT = Path(__file__).resolve().parents[2]
_PARTS = ("vime", "configs", "slurm", "pyproject.toml", "setup.cfg")
_SKIPPED = ("__pycache__",)


@dataclass(frozen=True)
class Snapshot:
    """Files of a run's code, and a name derived from their content."""

    files: tuple[tuple[str, str], ...]
    """(path in the snapshot, source file) of each file."""
    name: str


def checkout() -> Path | None:
    """Working tree that vime runs from; None if vime is installed."""
    return _CHECKOUT if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "configs").is_dir() else None


def look(recipe: Recipe) -> Snapshot | None:
    """Collect the files to copy for a run: the working tree's code and the modules of the recipe's plug-ins."""
    root = checkout()
    if root is None:
        return None
    files = {name: path for part in _PARTS for name, path in _files(root, part)}
    for module in plugin_modules(recipe):
        files.update(_module_files(module))
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode())
        with open(path, "rb", buffering=0) as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return Snapshot(tuple(sorted(files.items())), digest.hexdigest()[:12])


def folder_of(run_dir: str | os.PathLike[str], snapshot: Snapshot) -> str:
    return str(Path(run_dir) / CODE_FOLDER / snapshot.name)


def write(snapshot: Snapshot, folder: str | os.PathLike[str]) -> None:
    """Copy the files atomically: the folder appears whole or not at all. An existing one stays. Raises BadInput."""
    target = Path(folder)
    if target.is_dir():
        return
    try:
        private_folder(target.parent)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            for name, path in snapshot.files:
                (partial / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                shutil.copy2(path, partial / name)
            publish_folder(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise BadInput(f"cannot copy the code to {target}: {error.strerror}: give another --run-dir") from error


def plugin_modules(recipe: Recipe) -> list[str]:
    """Top-level names of the modules that the recipe names as `package.module:function`."""
    named = (
        recipe.rollout.rm_type,
        recipe.rollout.dynamic_sampling_filter_path,
        recipe.rollout.curriculum,
        recipe.algorithm.advantage_estimator,
        recipe.algorithm.policy_loss_type,
        *recipe.algorithm.mismatch_correction,
        recipe.agent.custom_generate_function_path,
        recipe.agent.environment,
        *recipe.agent.tools,
    )
    targets = [text.removeprefix("group:") for text in named if text]
    return sorted({target.partition(":")[0].partition(".")[0] for target in targets if ":" in target} - {"vime"})


def _module_files(module: str) -> Iterable[tuple[str, str]]:
    """Files of a module in the working directory or on the path; none for an installed or unknown module."""
    spec = PathFinder.find_spec(module, [os.getcwd(), *sys.path])
    if spec is None or spec.origin is None or not spec.has_location:
        return []
    origin = Path(spec.origin)
    if any(origin.is_relative_to(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")):
        return []
    top = origin.parent if spec.submodule_search_locations else origin
    return _files(top.parent, top.name)


def _files(root: Path, part: str) -> Iterator[tuple[str, str]]:
    """(path below `root`, path) of a file, or of all files below a folder. Strings: a dry run waits for these."""
    place = os.path.join(root, part)
    if os.path.isfile(place):
        yield part, place
        return
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        inside = os.path.relpath(folder, root)
        for name in sorted(names):
            yield os.path.join(inside, name), os.path.join(folder, name)
