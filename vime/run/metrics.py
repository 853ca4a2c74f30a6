"""Metrics of a run: one JSON line per step in `metrics.jsonl`, TensorBoard always, W&B by flag.

Names follow the usual scheme: `rollout/…`, `train/…`, `perf/…`, `eval/…`.
"""

from __future__ import annotations

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.recipe.schema import Recipe
from vime.run.evaluations import read_results
from vime.system.json_lines import LineFile, Lines
from vime.system.private import private_folder
from vime.system.redact import redacted

METRICS_FILE = "metrics.jsonl"
START = "start"
"""Key of a line that marks a start of training, with its first step."""


class MetricsWriter:
    """Writes scalars of one rollout at a time to every sink.

    A resumed run appends; readers keep the last line of a step. Metrics never end a run: a failing sink (full disk)
    loses values and is reported once.
    """

    def __init__(self, run_dir: str | Path, *, wandb: Mapping[str, Any] | None = None) -> None:
        """`wandb`: arguments of `wandb.init` from `wandb_settings`; None disables W&B."""
        from tensorboard.summary import Writer

        # First, so that a missing library leaves no file open.
        self._wandb: Any = None if wandb is None else _wandb_run(run_dir, wandb)
        run_dir = Path(run_dir)
        self._file = LineFile(run_dir / METRICS_FILE)
        board = private_folder(run_dir / "tensorboard")
        self._board = Writer(str(board))
        self._failed: set[str] = set()
        # Errors that TensorBoard's thread passes on.
        self._errors = (OSError, RuntimeError, ValueError, *(() if self._wandb is None else (_wandb_error(),)))

    def start(self, step: int) -> None:
        """Mark a start of training at this step: earlier lines of this and later steps belong to a dead branch."""
        self._to(METRICS_FILE, lambda: self._file.add({START: step, "time": round(time.time(), 3)}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step` (the rollout number). Non-finite values are written as null."""
        clean = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **clean}
        finite = {name: value for name, value in clean.items() if value is not None}
        self._to(METRICS_FILE, lambda: self._file.add(line))
        self._to("TensorBoard", lambda: self._to_board(step, finite))
        if self._wandb is not None:
            self._to("Weights & Biases", lambda: self._wandb.log(finite, step=step))

    def close(self) -> None:
        self._to(METRICS_FILE, self._file.close)
        self._to("TensorBoard", self._board.close)
        if self._wandb is not None:
            self._to("Weights & Biases", self._wandb.finish)

    def _to_board(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def _to(self, sink: str, send: Callable[[], object]) -> None:
        try:
            send()
        except self._errors as error:
            if sink not in self._failed:
                print(f"warning: {sink} takes no metrics, values are lost: {error}", flush=True)
            self._failed.add(sink)


def _wandb_error() -> type[Exception]:
    import wandb  # pyright: ignore[reportMissingImports]

    return wandb.Error


def wandb_settings(recipe: Recipe, run_name: str) -> dict[str, Any] | None:
    """Arguments of `wandb.init` for a run; None without `--use-wandb`. A resumed run continues its own page.

    Secrets in the recipe are not logged.
    """
    options = recipe.misc
    if not options.use_wandb:
        return None
    return {
        "project": options.wandb_project or "vime",
        "entity": options.wandb_entity,
        "group": options.wandb_group,
        "name": options.wandb_name or run_name,
        "tags": options.wandb_tags or None,
        "mode": options.wandb_mode,
        "id": re.sub(r"[/\\#?%:]", "-", run_name),
        "resume": "allow",
        "config": redacted(recipe.model_dump(mode="json")),
    }


def _wandb_run(run_dir: str | Path, settings: Mapping[str, Any]) -> Any:
    """Open the run's page in Weights & Biases."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput(
            "--use-wandb: wandb is not installed where the run's driver runs: pip install wandb, or leave the flag out "
            "(docs/report.md)"
        ) from error
    return wandb.init(dir=str(run_dir), **settings)


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
