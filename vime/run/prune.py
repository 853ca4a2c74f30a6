"""Select and remove old checkpoints of ended runs. Those from which a run resumes stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from vime.errors import BadInput
from vime.run.checkpoints import is_partial, iteration_of, tracked
from vime.run.plan import Plan
from vime.run.state import RunState

_OVER = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Old:
    """A folder that can be removed."""

    run: str
    """Name of its run."""
    path: Path
    bytes: int
    why: str


def save_folder(plan: Plan) -> Path:
    return Path(plan.recipe.checkpoint.save or os.path.join(plan.run_dir, "checkpoints"))


def old_checkpoints(
    runs: Iterable[tuple[Plan, RunState]], *, keep: int = 1, among: Collection[str] | None = None
) -> list[Old]:
    """Checkpoints of ended runs older than the `keep` newest complete ones, and interrupted saves.

    `runs` must hold all known runs: folders that an unfinished one saves to or resumes from are left alone, and a lost
    run may still be running. `among` limits the selection to these run folders.
    """
    known = list(runs)
    busy = {
        folder
        for plan, state in known
        if state.state not in _OVER
        for folder in (save_folder(plan), Path(plan.recipe.checkpoint.load or save_folder(plan)))
    }
    found: dict[Path, Old] = {}
    for plan, state in known:
        folder = save_folder(plan)
        if state.state in _OVER and folder not in busy and (among is None or plan.run_dir in among):
            for path, why in _old_in(folder, keep):
                found[path] = Old(plan.run_name, path, size_of(path), why)
    return list(found.values())


def _old_in(folder: Path, keep: int) -> list[tuple[Path, str]]:
    try:
        newest = tracked(folder)
        names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except (OSError, BadInput):
        # Without a valid tracker no checkpoint is known to be whole: remove nothing.
        return []
    if not newest.isdigit():
        return []
    counted = sorted((number, name) for name in names if (number := iteration_of(name)) is not None)
    counted = [(number, name) for number, name in counted if number <= int(newest)]
    if not counted or counted[-1][0] != int(newest):
        return []
    old = [(folder / name, f"older than the {keep} newest") for _, name in counted[:-keep]]
    return old + [(folder / name, "a save that was cut short") for name in names if is_partial(name)]


def size_of(folder: Path) -> int:
    """Bytes of the files below."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def remove(old: Old) -> None:
    """Remove a folder, renamed first so that remains after a crash do not look like a checkpoint."""
    if old.path.name.startswith("."):
        shutil.rmtree(old.path)
        return
    partial = old.path.with_name(f".{old.path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(old.path, partial)
    shutil.rmtree(partial)
