"""Results of evaluations beside the run: the run's driver takes them, and an evaluation delivers its own after it."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from vime.planning.subject import WEIGHTS
from vime.run.evaluations import (
    Result,
    evaluation_folders,
    is_taken,
    mark_taken,
    read_result,
    why_left_out,
)
from vime.run.folder import read_plan
from vime.run.journal import last_start, read_events
from vime.run.logs import TRAIN
from vime.run.metrics import MetricsWriter
from vime.run.owner import read_owner
from vime.run.trackers import trackers_of

POLL_SECONDS = 10.0
DELIVERY_SECONDS = 60.0
"""Time that the driver of a live run has to take a result."""


class Results:
    """Takes results of evaluations into the run's metrics, once each."""

    def __init__(self, run_dir: str, metrics: MetricsWriter) -> None:
        self._run_dir, self._metrics = run_dir, metrics
        self._told: set[tuple[Path, float | None]] = set()
        """Folders, and the time of their result or None: an evaluation may be repeated by hand."""

    async def run(self) -> None:
        """Take what arrives, until cancelled."""
        while True:
            await self.take()
            await asyncio.sleep(POLL_SECONDS)

    async def take(self) -> None:
        """Take what is there."""
        for folder, result, why in await asyncio.to_thread(self._look):
            if result is not None:
                write(self._metrics, result)
            else:
                print(f"eval {int(folder.name)} is left out: {why}", flush=True)
            await asyncio.to_thread(_settle, folder, taken=result is not None)

    def _look(self) -> list[tuple[Path, Result | None, str | None]]:
        """Evaluations that have ended since the last call."""
        found = []
        for folder in evaluation_folders(self._run_dir):
            if is_taken(folder):
                continue
            result = read_result(folder)
            why = why_left_out(folder) if result is None else None
            key = folder, None if result is None else result.time
            if (result is not None or why is not None) and key not in self._told:
                self._told.add(key)
                found.append((folder, result, why))
        return found


def _settle(folder: Path, *, taken: bool) -> None:
    if taken:
        mark_taken(folder)
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)


def write(metrics: MetricsWriter, result: Result) -> None:
    """Write a result under its rollout's number."""
    metrics.write(result.rollout_id, result.values)
    print(f"eval {result.rollout_id}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.values.items()), flush=True)


def _driver_lives(run_dir: str) -> bool:
    """True while a start of the run may still have a driver that takes results."""
    if read_owner(run_dir) is None:
        return False
    return not any(event.kind == "stage-end" and event.stage == TRAIN for event in last_start(read_events(run_dir)))


def deliver(folder: Path, run_dir: str, result: Result) -> None:
    """Wait until the run's driver has taken the result; write it here if no start of the run is alive.

    A driver that is too busy to take it in time takes it later.
    """
    deadline = time.monotonic() + DELIVERY_SECONDS
    while not is_taken(folder):
        if not _driver_lives(run_dir):
            plan = read_plan(run_dir)
            metrics = MetricsWriter(run_dir, trackers_of(plan.recipe, plan.run_name, run_dir))
            metrics.write(result.rollout_id, result.values)
            metrics.close()
            mark_taken(folder)
            return
        if time.monotonic() > deadline:
            print(f"the driver of {run_dir} takes the result later", flush=True)
            return
        time.sleep(1.0)
