"""A user's runs, newest last, in `$XDG_STATE_HOME/vime/runs.jsonl`, so that commands find the last one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vime.errors import BadInput
from vime.run.folder import PLAN
from vime.system.json_lines import LineFile, Lines
from vime.system.private import private_folder


@dataclass(frozen=True)
class Run:
    """One line of the registry."""

    run_name: str
    run_dir: Path
    time: float
    """Submission time, Unix seconds."""


def registry_path() -> Path:
    """Path of the registry; the file need not exist."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "vime" / "runs.jsonl"


def record_run(run_dir: str | os.PathLike[str]) -> None:
    """Append a run; a line is one write, so that concurrent submissions do not mix."""
    path, folder = registry_path(), Path(run_dir).absolute()
    line = {"run_name": folder.name, "run_dir": str(folder), "time": time.time()}
    try:
        private_folder(path.parent)
        file = LineFile(path)
        try:
            file.add(line)
        finally:
            file.close()
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}: set XDG_STATE_HOME to a folder of your own") from error


def runs() -> list[Run]:
    """All runs whose folder still holds a plan, oldest first; a resubmitted run appears at its last submission."""
    known = {run.run_dir: run for run in _lines()}
    return sorted((run for run in known.values() if (run.run_dir / PLAN).is_file()), key=lambda run: run.time)


def last_run() -> Path:
    """Folder of the newest run. Raises BadInput without any."""
    if found := runs():
        return found[-1].run_dir
    raise BadInput(f"no run is recorded in {registry_path()}: give the run's folder")


def find_run(name: str) -> Path:
    """Folder of the newest run of this name, or at this path."""
    for candidate in (Path(name).expanduser(), *(run.run_dir for run in reversed(runs()) if run.run_name == name)):
        if (candidate / PLAN).is_file():
            return candidate.absolute()
    known = ", ".join(run.run_name for run in runs()[-5:]) or "none"
    raise BadInput(f"no run {name!r}: give its folder or a recorded name (the last ones: {known})")


def _lines() -> Iterator[Run]:
    """Entries in order of writing. A damaged one is skipped: its run is still found by its path."""
    try:
        yield from Lines(registry_path()).read(
            lambda entry: Run(str(entry["run_name"]), Path(entry["run_dir"]), float(entry["time"]))
        )
    except OSError as error:
        raise BadInput(f"cannot read {registry_path()}: {error.strerror}") from error
