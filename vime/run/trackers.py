"""Trackers that get a run's metrics beside `metrics.jsonl`: TensorBoard always, W&B and MLflow by flag."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from vime.errors import BadInput
from vime.recipe.schema import Recipe
from vime.run.evaluations import EVALUATION
from vime.system.private import private_folder
from vime.system.redact import redacted

MLFLOW_PARAMS = 100
"""Parameters that one call of MLflow takes."""
MLFLOW_CHARACTERS = 500
"""Characters of a parameter that every server of MLflow takes."""


class Tracker(Protocol):
    """A service or file format that draws curves."""

    @property
    def name(self) -> str:
        """Its name in warnings."""
        ...

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """Errors that lose values but do not end the run."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add finite values at a step; it may be an earlier step than the last one."""
        ...

    def close(self) -> None: ...


def trackers_of(recipe: Recipe, run_name: str, run_dir: str | Path) -> list[Tracker]:
    """Trackers that the recipe asks for, open. Raises BadInput if the library of one is missing."""
    found: list[Tracker] = []
    if recipe.misc.use_wandb:
        found.append(WeightsAndBiases(run_dir, wandb_settings(recipe, run_name)))
    if recipe.misc.use_mlflow:
        found.append(MLflow(run_dir, recipe, run_name))
    # Last, so that a missing library of another leaves no file open.
    return [TensorBoard(run_dir), *found]


class TensorBoard:
    """Event files in `<run>/tensorboard`."""

    name = "TensorBoard"
    # OSError and what its thread passes on.
    errors = (OSError, RuntimeError, ValueError)

    def __init__(self, run_dir: str | Path) -> None:
        from tensorboard.summary import Writer

        self._board = Writer(str(private_folder(Path(run_dir) / "tensorboard")))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A page of Weights & Biases; a resumed run continues its own."""

    name = "Weights & Biases"

    def __init__(self, run_dir: str | Path, settings: Mapping[str, Any]) -> None:
        """`settings`: arguments of `wandb.init`. Raises BadInput without the library."""
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("wandb") from error
        self.errors = (OSError, RuntimeError, ValueError, wandb.Error)
        self._run = wandb.init(dir=str(run_dir), **settings)
        self._run.define_metric(f"{EVALUATION}*", step_metric=f"{EVALUATION}rollout")
        self._newest, self._row = -1, set[str]()
        self._late: list[dict[str, float]] = []
        """Values of earlier steps, such as those of an evaluation beside the run: W&B takes them in later rows only."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        of_evaluation = any(name.startswith(EVALUATION) for name in values)
        sent = {**values, f"{EVALUATION}rollout": float(step)} if of_evaluation else dict(values)
        if step < self._newest:
            self._late.append(sent)
        else:
            if step > self._newest:
                self._newest, self._row = step, set()
            self._add(sent)
        if self._late and not self._row & self._late[0].keys():
            self._add(self._late.pop(0))

    def close(self) -> None:
        for number, values in enumerate(self._late, self._newest + 1):
            self._run.log(values, step=number)
        self._run.finish()

    def _add(self, values: dict[str, float]) -> None:
        """Add to the newest row, where a name has one value."""
        self._run.log(values, step=self._newest)
        self._row |= values.keys()


def wandb_settings(recipe: Recipe, run_name: str) -> dict[str, Any]:
    """Arguments of `wandb.init` for a run. Secrets in the recipe are not logged."""
    options = recipe.misc
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


class MLflow:
    """A run of an MLflow server, or of the file store `<run>/mlflow`; a resumed run continues its own."""

    name = "MLflow"
    TAG = "vime.run_dir"
    """Tag by which a resumed run finds its own."""

    def __init__(self, run_dir: str | Path, recipe: Recipe, run_name: str) -> None:
        """Raises BadInput without the library, or for a server that does not answer."""
        try:
            from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
            from mlflow.exceptions import MlflowException  # pyright: ignore[reportMissingImports]
            from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("mlflow") from error
        self.errors = (OSError, RuntimeError, ValueError, MlflowException)
        self._metric = Metric
        place = recipe.misc.mlflow_tracking_uri
        if place is None:
            place = private_folder(Path(run_dir) / "mlflow").as_uri()
            # MLflow would rather have a database, for which its small package lacks the libraries.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        try:
            self._client = MlflowClient(place)
            self._id = self._own_run(recipe.misc.mlflow_experiment, run_name, str(run_dir))
            params = [Param(name, value[:MLFLOW_CHARACTERS]) for name, value in _flat(recipe)]
            for first in range(0, len(params), MLFLOW_PARAMS):
                self._client.log_batch(self._id, params=params[first : first + MLFLOW_PARAMS])
        except MlflowException as error:
            # A resumed run may have other values, which MLflow refuses; the first ones stay.
            if not hasattr(self, "_id"):
                raise BadInput(f"--use-mlflow: {place}: {str(error).splitlines()[0]}") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(mlflow_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _own_run(self, experiment: str, run_name: str, run_dir: str) -> str:
        known = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if known is None else known.experiment_id
        mine = f"tags.`{self.TAG}` = '{run_dir}'"
        found = self._client.search_runs([number], filter_string=mine, max_results=1) if "'" not in run_dir else []
        if found:
            self._client.update_run(found[0].info.run_id, status="RUNNING")
            return found[0].info.run_id
        return self._client.create_run(number, run_name=run_name, tags={self.TAG: run_dir}).info.run_id


def mlflow_name(name: str) -> str:
    """The metric's name in the characters that MLflow allows: `pass@8` becomes `pass_at_8`."""
    return re.sub(r"[^\w\-. /]", "_", name.replace("@", "_at_"))


def check_tracking(recipe: Recipe) -> None:
    """Raise BadInput for a tracking address with a password in it: plans and logs would hold it."""
    place = recipe.misc.mlflow_tracking_uri
    if place and urlsplit(place).password:
        raise BadInput(
            "--mlflow-tracking-uri holds a password: leave it out, and give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment of the run"
        )


def _flat(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Options of the recipe as `group.option`, without secrets."""
    content = redacted(recipe.model_dump(mode="json", exclude_defaults=True))
    for group, options in content.items():
        if isinstance(options, dict):
            yield from ((f"{group}.{name}", str(value)) for name, value in options.items() if value not in (None, ""))
        else:
            yield group, str(options)


def _missing(library: str) -> BadInput:
    return BadInput(
        f"--use-{library}: {library} is not installed where the run's driver runs: pip install {library}, or leave "
        "the flag out (docs/report.md)"
    )
