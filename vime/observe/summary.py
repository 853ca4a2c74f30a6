"""What a run was and how it went, read from its folder: the one source of the report and of its last line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vime.observe.metrics import read_metrics, series
from vime.observe.samples import read_samples
from vime.observe.timeline import Span, read_timeline
from vime.planning.io import read_plan
from vime.planning.types import Plan

REWARD = "rollout/raw_reward"
ENDS = 5


@dataclass(frozen=True)
class RunSummary:
    """Everything the report shows."""

    plan: Plan
    steps: dict[int, dict[str, float]]
    spans: list[Span]
    events: list[dict[str, Any]]
    samples: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    checkpoints: list[str] = field(default_factory=list)
    preflight: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rewards(self) -> list[tuple[int, float]]:
        return series(self.steps, REWARD)

    def mean_reward(self, *, first: bool, count: int = ENDS) -> float | None:
        """Mean reward over the first or the last `count` rollouts, over all finished groups; None without rollouts."""
        values = [value for _, value in self.rewards]
        chosen = values[:count] if first else values[-count:]
        return sum(chosen) / len(chosen) if chosen else None

    def last_line(self, report: Path) -> str:
        """Run name, mean reward of the first and of the last rollouts, path of the report."""
        first, last = self.mean_reward(first=True), self.mean_reward(first=False)
        count = min(ENDS, len(self.rewards))
        told = "no rollout finished" if first is None or last is None else (
            f"mean reward {first:.3f} (first {count} rollouts) -> {last:.3f} (last {count} rollouts)"
        )  # fmt: skip
        return f"{self.plan.run_name}: {told}; report {report}"


def read_run(run_dir: str | Path, events: list[dict[str, Any]]) -> RunSummary:
    """Read a run's folder; `events` come from the journal's own reader, as mappings."""
    folder = Path(run_dir)
    plan = read_plan(folder)
    save = Path(plan.recipe.checkpoint.save or folder / "checkpoints")
    kept = sorted(save.glob("iter_*")) if save.is_dir() else []
    shown = _spread(sorted((folder / "rollouts").glob("*.jsonl")), 6) if (folder / "rollouts").is_dir() else []
    return RunSummary(
        plan=plan,
        steps=read_metrics(folder),
        spans=read_timeline(folder),
        events=events,
        samples={int(path.stem): read_samples(path) for path in shown},
        checkpoints=[str(path) for path in kept],
        preflight=[
            row for event in events if event.get("kind") == "preflight" for row in event["data"].get("nodes", [])
        ],
    )


def _spread(items: list[Path], most: int) -> list[Path]:
    """At most `most` items, first and last among them, evenly apart."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
