"""Metrics of a run: one JSON line per step in `metrics.jsonl`, and the same values to its trackers.

Names follow the usual scheme: `rollout/…`, `train/…`, `perf/…`, `eval/…`.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vime.run.evaluations import read_results
from vime.run.trackers import Tracker
from vime.system.json_lines import LineFile, Lines

METRICS_FILE = "metrics.jsonl"
START = "start"
"""Key of a line that marks a start of training, with its first step."""


class MetricsWriter:
    """Writes scalars of one rollout at a time to the run's file and to every tracker.

    A resumed run appends; readers keep the last line of a step. Metrics never end a run: a failing sink (full disk)
    loses values and is reported once.
    """

    def __init__(self, run_dir: str | Path, trackers: Sequence[Tracker] = ()) -> None:
        """`trackers`: those of `vime.run.trackers.trackers_of`, which are closed with this."""
        self._trackers = trackers
        self._file = LineFile(Path(run_dir) / METRICS_FILE)
        self._failed: set[str] = set()

    def start(self, step: int) -> None:
        """Mark a start of training at this step: earlier lines of this and later steps belong to a dead branch."""
        self._to_file(lambda: self._file.add({START: step, "time": round(time.time(), 3)}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step` (the rollout number). Non-finite values are written as null."""
        clean = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **clean}
        finite = {name: value for name, value in clean.items() if value is not None}
        self._to_file(lambda: self._file.add(line))
        for tracker in self._trackers:
            self._to(tracker.name, tracker.errors, functools.partial(tracker.write, step, finite))

    def close(self) -> None:
        self._to_file(self._file.close)
        for tracker in self._trackers:
            self._to(tracker.name, tracker.errors, tracker.close)

    def _to_file(self, send: Callable[[], object]) -> None:
        self._to(METRICS_FILE, (OSError,), send)

    def _to(self, sink: str, errors: tuple[type[Exception], ...], send: Callable[[], object]) -> None:
        try:
            send()
        except errors as error:
            if sink not in self._failed:
                print(f"warning: {sink} takes no metrics, values are lost: {error}", flush=True)
            self._failed.add(sink)


def read_metrics(run_dir: str | Path, damage: Counter[str] | None = None) -> dict[int, dict[str, float]]:
    """All steps of the run's live branch, in order, later lines of a step merged over earlier ones.

    A start at a step drops this step and later ones: the run was set back to a checkpoint before them. Results of
    evaluations beside the run are merged unless their weights are of such a branch. Invalid lines are skipped, and
    counted in `damage` under the file's name.
    """
    steps: dict[int, dict[str, float]] = {}
    starts: list[tuple[int, float]] = []
    lines = Lines(Path(run_dir) / METRICS_FILE)
    for step, values in lines.read(_step):
        if not isinstance(values, dict):
            starts.append((step, values))
            steps = {number: known for number, known in steps.items() if number < step}
        else:
            steps.setdefault(step, {}).update(values)
    for result in read_results(run_dir):
        number = result.rollout_id
        if not any(first <= number and result.weights_time < when for first, when in starts):
            steps.setdefault(number, {}).update(result.values)
    if damage is not None:
        damage[METRICS_FILE] += lines.skipped
    return dict(sorted(steps.items()))


def _step(line: dict[str, Any]) -> tuple[int, dict[str, float] | float]:
    """Step and values of a line; of a start, its Unix time. Raises ValueError, KeyError or TypeError."""
    if START in line:
        return int(line[START]), float(line.get("time", 0.0))
    step = int(line.pop("step"))
    return step, {name: float(value) for name, value in line.items() if value is not None}


def series(steps: Mapping[int, Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, without the steps that lack it."""
    return [(step, values[name]) for step, values in steps.items() if name in values]
