"""Everything the report shows, read from a run's folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.observe.browse import chosen
from vime.observe.lengths import Lengths, read_lengths
from vime.observe.samples import read_samples
from vime.observe.timeline import Span, read_timeline
from vime.run.checkpoints import iteration_of, tracked, tracks_iteration
from vime.run.evaluations import left_out
from vime.run.folder import read_binding, read_plan
from vime.run.journal import read_events
from vime.run.metrics import read_metrics, series
from vime.run.plan import Binding, Plan

REWARD = "rollout/raw_reward"
ENDS = 5
LARGE_BYTES, OF_LARGE = 8 << 20, 16
"""Size of a rollout's file from which only this many of its samples, the best and the worst, are read."""
TRACED_ROLLOUTS = 100
"""Newest rollouts for which the trace holds the spans of every rank; the driver's are there for all."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk."""

    path: str
    rollout_id: int
    bytes: int
    time: float
    """Unix seconds at which it was written."""


@dataclass(frozen=True)
class RunSummary:
    """Everything the report shows."""

    plan: Plan
    steps: dict[int, dict[str, float]]
    spans: list[Span]
    events: list[dict[str, Any]]
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    preflight: list[dict[str, Any]] = field(default_factory=list)
    binding: Binding | None = None
    lengths: Lengths | None = None
    left_out: tuple[str, ...] = ()
    """Evaluations beside the run without a result, each with its reason."""
    damage: Counter[str] = field(default_factory=Counter)
    """Lines that could not be read, by file."""

    @property
    def starts(self) -> list[tuple[float, float | None]]:
        """Start and end of every start of the run, in Unix seconds; None where the end is not recorded."""
        found: list[tuple[float, float | None]] = []
        for event in self.events:
            if event["kind"] == "run-start":
                found.append((float(event["time"]), None))
            elif event["kind"] == "run-end" and found:
                found[-1] = (found[-1][0], float(event["time"]))
        return found

    @property
    def rewards(self) -> list[tuple[int, float]]:
        return series(self.steps, REWARD)

    @property
    def last_start(self) -> list[dict[str, Any]]:
        """Events since the last start of the run."""
        starts = [place for place, event in enumerate(self.events) if event["kind"] == "run-start"]
        return self.events[starts[-1] :] if starts else self.events

    @property
    def end(self) -> dict[str, Any] | None:
        """Event that ended the last start; None while the run is active, or if it was cut off."""
        return next((event for event in reversed(self.last_start) if event["kind"] == "run-end"), None)

    def mean_reward(self, *, first: bool, count: int = ENDS) -> float | None:
        """Mean reward over the first or the last `count` rollouts, over all finished groups; None without rollouts."""
        return self.mean(REWARD, first=first, count=count)

    def mean(self, name: str, *, first: bool = False, count: int = ENDS) -> float | None:
        """Mean of a metric over the first or the last `count` rollouts that have it."""
        values = [value for _, value in series(self.steps, name)]
        chosen = values[:count] if first else values[-count:]
        return sum(chosen) / len(chosen) if chosen else None

    def last_line(self, report: Path) -> str:
        """One line: run name, mean reward of the first and last rollouts, path of the report."""
        first, last = self.mean_reward(first=True), self.mean_reward(first=False)
        count = min(ENDS, len(self.rewards))
        told = "no rollout finished" if first is None or last is None else (
            f"mean reward {first:.3f} (first {count} rollouts) -> {last:.3f} (last {count} rollouts)"
        )  # fmt: skip
        return f"{self.plan.run_name}: {told}; report {report}"


def read_run(run_dir: str | Path, events: list[dict[str, Any]]) -> RunSummary:
    """Summary of a run's folder. `events`: the journal, as mappings."""
    folder = Path(run_dir)
    plan = read_plan(folder)
    steps = read_metrics(folder, damage := Counter())
    lengths = read_lengths(folder, damage=damage)
    spans = read_timeline(folder, rank_rollouts=TRACED_ROLLOUTS, damage=damage)
    return RunSummary(
        plan=plan,
        steps=steps,
        spans=spans,
        events=events,
        samples=_samples(folder, max(steps, default=-1), damage),
        damage=damage,
        checkpoints=list(_checkpoints(Path(plan.recipe.checkpoint.save or folder / "checkpoints"))),
        preflight=_preflight(events),
        binding=_binding(folder),
        lengths=lengths,
        left_out=tuple(left_out(folder, read_events(folder)).values()),
    )


def _samples(folder: Path, last: int, damage: Counter[str]) -> dict[int, list[dict[str, Any]]]:
    """Shown samples of some rollouts up to `last`; later ones are of a branch from before the run was set back."""
    found = {int(path.stem): path for path in (folder / "rollouts").glob("*.jsonl") if path.stem.isdecimal()}
    paths = {number: path for number, path in found.items() if number <= last}
    sizes = {number: path.stat().st_size for number, path in paths.items()}
    kept = chosen({number: min(size, LARGE_BYTES) for number, size in sizes.items()})
    most = {number: OF_LARGE if sizes[number] > LARGE_BYTES else None for number in kept}
    return {number: read_samples(paths[number], most[number], damage) for number in kept}


def _preflight(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the newest preflight."""
    tables = [event["data"].get("nodes", []) for event in events if event.get("kind") == "preflight"]
    return tables[-1] if tables else []


def _binding(folder: Path) -> Binding | None:
    try:
        return read_binding(folder)
    except BadInput:
        # The run ended before its nodes were known.
        return None


def _checkpoints(root: Path) -> list[Checkpoint]:
    """Published checkpoints up to the tracked one; newer ones are of a branch from before the run was set back."""
    found = []
    try:
        newest = int(tracked(root)) if tracks_iteration(root) else -1
    except BadInput:
        newest = -1
    for path in sorted(root.glob("iter_*")) if root.is_dir() else []:
        number = iteration_of(path.name)
        if number is not None and number <= newest:
            sizes = [entry.stat().st_size for entry in os.scandir(path) if entry.is_file()]
            found.append(Checkpoint(str(path), number, sum(sizes), path.stat().st_mtime))
    return found
