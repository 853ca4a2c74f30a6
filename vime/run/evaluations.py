"""Evaluations beside a run. Each has a run folder of its own below the run's, and is written by its own job alone.

<run>/evaluations/0000012/              run folder of the evaluation of the weights after rollout 12
<run>/evaluations/0000012/result.json   its values
<run>/evaluations/0000012/taken         exists once the values have reached TensorBoard and the other trackers

`metrics.jsonl` keeps its one writer: the run's driver takes results while it lives. Readers merge all results, taken or
not (`vime.run.metrics`), so that none is lost when the run ends first.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vime.errors import Cause
from vime.run.journal import Event, last_start, read_events
from vime.system.files import PRIVATE, read_json, write_file, write_json

EVALUATION = "eval/"
"""Beginning of the names of an evaluation's metrics."""
EVALUATIONS, RESULT, _TAKEN = "evaluations", "result.json", "taken"
_NUMBER = re.compile(r"[0-9]{7,18}")


@dataclass(frozen=True)
class Result:
    """Values of one evaluation."""

    rollout_id: int
    """Last rollout that the weights were trained on, and step of the values."""
    values: dict[str, float]
    """By metric: `eval/<set>` and its relatives."""
    weights_time: float
    """Unix time at which the weights were saved."""
    time: float = field(default_factory=time.time)
    """Unix time of the result."""


def evaluation_folder(run_dir: str | os.PathLike[str], rollout_id: int) -> Path:
    """Run folder of an evaluation."""
    return Path(run_dir) / EVALUATIONS / f"{rollout_id:07d}"


def evaluation_folders(run_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """Folders of all evaluations of a run, in the order of their rollouts."""
    root = Path(run_dir) / EVALUATIONS
    found = root.iterdir() if root.is_dir() else ()
    yield from sorted((path for path in found if _NUMBER.fullmatch(path.name)), key=lambda path: int(path.name))


def write_result(folder: Path, result: Result) -> None:
    """Write the result of an evaluation; its values are then new to the trackers."""
    (folder / _TAKEN).unlink(missing_ok=True)
    write_json(folder / RESULT, asdict(result), mode=PRIVATE)


def read_result(folder: Path) -> Result | None:
    """Result in an evaluation's folder; None if there is none, or it is damaged."""
    content = read_json(folder / RESULT)
    try:
        return None if content is None else Result(**content)
    except TypeError:
        return None


def read_results(run_dir: str | os.PathLike[str]) -> list[Result]:
    """Results of all evaluations of a run."""
    found = (read_result(folder) for folder in evaluation_folders(run_dir))
    return [result for result in found if result is not None]


def is_taken(folder: Path) -> bool:
    """True once the result has reached the trackers."""
    return (folder / _TAKEN).exists()


def mark_taken(folder: Path) -> None:
    """Note that the result has reached the trackers. A writer that dies before sends it a second time, unchanged."""
    write_file(folder / _TAKEN, "", mode=PRIVATE)


def why_left_out(folder: Path) -> str | None:
    """Cause and text of an evaluation that has ended without a result; None for any other."""
    if (folder / RESULT).exists():
        return None
    end = next((event for event in reversed(last_start(read_events(folder))) if event.kind == "run-end"), None)
    if end is None or end.data.get("requeued") or end.data.get("cause") == Cause.SUCCESS.name:
        return None
    return f"{end.data.get('cause')}: {end.text}"


def left_out(run_dir: str | os.PathLike[str], events: Iterable[Event]) -> dict[int, str]:
    """Evaluations without a point, and why: those that were never submitted by the journal, and those that failed.

    `events`: the run's journal.
    """
    known = [event for event in events if event.kind == "evaluation"]
    found = {event.data["rollout_id"]: event.text for event in known if event.data.get("left_out")}
    for event in known:
        if not event.data.get("left_out"):
            found.pop(event.data["rollout_id"], None)
    for folder in evaluation_folders(run_dir):
        if (why := why_left_out(folder)) is not None:
            found[int(folder.name)] = f"rollout {int(folder.name)} is left out: {why}"
        elif (folder / RESULT).exists():
            found.pop(int(folder.name), None)
    return dict(sorted(found.items()))
