"""Metrics of a run: one JSON line a step in `metrics.jsonl`, TensorBoard always, W&B by flag.

Names are those that users of such systems know: `rollout/…`, `train/…`, `perf/…`, `eval/…`.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.recipe.schema import Recipe
from vime.system.private import private_folder
from vime.system.redact import redacted

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes scalars of one rollout at a time to every sink.

    A resumed run appends; readers keep the last line of a step.
    """

    def __init__(self, run_dir: str | Path, *, wandb: Mapping[str, Any] | None = None) -> None:
        """`wandb`: arguments of `wandb.init`, as `wandb_settings` makes them; None leaves W&B out."""
        from tensorboard.summary import Writer

        # First of all, so that a library that is missing leaves no file open.
        self._wandb: Any = None if wandb is None else _wandb_run(run_dir, wandb)
        run_dir = Path(run_dir)
        path = run_dir / METRICS_FILE
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "a", encoding="utf-8")
        board = private_folder(run_dir / "tensorboard")
        self._board = Writer(str(board))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log `values` at `step` (the number of the rollout). A value that is not finite is written as null."""
        clean = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        line = {"step": step, "time": round(time.time(), 3), **clean}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log({name: value for name, value in clean.items() if value is not None}, step=step)

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


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
    """The run's page in Weights & Biases."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput(
            "--use-wandb: wandb is not installed where the run's driver runs: pip install wandb, or leave the flag out "
            "(docs/report.md)"
        ) from error
    return wandb.init(dir=str(run_dir), **settings)


def read_metrics(run_dir: str | Path) -> dict[int, dict[str, float]]:
    """All steps of a run, in order, later lines of a step merged over earlier ones (a resumed run repeats steps)."""
    steps: dict[int, dict[str, float]] = {}
    for line in _lines(Path(run_dir) / METRICS_FILE):
        step = int(line.pop("step"))
        steps.setdefault(step, {}).update({name: value for name, value in line.items() if value is not None})
    return dict(sorted(steps.items()))


def series(steps: Mapping[int, Mapping[str, float]], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, without the steps that lack it."""
    return [(step, values[name]) for step, values in steps.items() if name in values]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for text in file:
            if not text.endswith("\n"):
                return  # the writer was stopped inside its last line
            yield json.loads(text)
