"""Phases of a run, measured by the driver: each gives a span of the timeline, metrics and a printed line."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from vime.observe.timeline import Span, Timeline
from vime.recipe.schema import Recipe
from vime.rollout.sampler import Sampler
from vime.run.metrics import MetricsWriter
from vime.run.plan import Plan
from vime.run.trackers import Tracker, trackers_of
from vime.samples import Rollout
from vime.sync.ranks import TrainerCall, WorkerMethods
from vime.train.deadlines import PhaseDeadlines

SPANS_SECONDS = 60.0


@dataclass(frozen=True)
class Phases:
    """Writers of metrics and timeline, and the phases shared by the loop and the debug modes."""

    plan: Plan
    deadlines: PhaseDeadlines
    timeline: Timeline
    metrics: MetricsWriter

    @classmethod
    def of(cls, plan: Plan, deadlines: PhaseDeadlines | None = None, live: Tracker | None = None) -> Phases:
        """Open the writers in the plan's run folder. `live`: a tracker that shows the values while the run goes."""
        trackers = trackers_of(plan.recipe, plan.run_name, plan.run_dir)
        metrics = MetricsWriter(plan.run_dir, [*trackers, *([] if live is None else [live])])
        return cls(plan, deadlines or PhaseDeadlines.of(plan), Timeline(plan.run_dir), metrics)

    def close(self) -> None:
        self.metrics.close()
        self.timeline.close()

    def generation(self, sampler: Sampler, rollout_id: int) -> asyncio.Task[Rollout]:
        """Start a rollout as a task."""

        async def generate() -> Rollout:
            with self.timeline.phase("generate", rollout_id):
                return await sampler.generate(rollout_id)

        return asyncio.create_task(generate())

    async def train(self, trainer: TrainerCall, rollout: Rollout) -> dict[str, float]:
        """Run all optimizer steps of a rollout; return the metrics of rank 0."""
        import ray

        with self.timeline.phase("train", rollout.rollout_id):
            stored: Any = ray.put(rollout)
            results = await trainer(self.deadlines.train, WorkerMethods.train, stored)
        spans = await trainer(SPANS_SECONDS, WorkerMethods.take_spans)
        self.timeline.add_ranks(rollout.rollout_id, spans)
        return results[0]

    async def evaluate_if_due(self, sampler: Sampler, rollout_id: int) -> None:
        """Evaluate before this rollout if the recipe asks for it."""
        if not evaluates_before(self.plan.recipe, rollout_id):
            return
        with self.timeline.phase("eval", rollout_id):
            values = await sampler.evaluate(rollout_id)
        self.record_rewards(sampler, rollout_id)
        self.metrics.write(rollout_id, values)
        print(f"eval {rollout_id}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)

    def record_rewards(self, sampler: Sampler, rollout_id: int) -> None:
        """Add the spans of grading to the timeline."""
        for name, start, end in sampler.take_spans():
            self.timeline.add(Span(name, rollout_id, "rewards", start, end))

    def report(self, rollout_id: int, values: dict[str, float]) -> None:
        """Write the metrics of a rollout and print its line."""
        self.metrics.write(rollout_id, values)
        self.print_line(rollout_id, values)

    def print_line(self, rollout_id: int, values: dict[str, float]) -> None:
        """One line per rollout: reward, loss, gradient norm, and the seconds of each phase."""
        shown = ("rollout/raw_reward", "train/loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff")
        text = ", ".join(f"{name.split('/')[1]} {values[name]:.4g}" for name in shown if name in values)
        times = ", ".join(
            f"{phase} {values[key]:.1f} s" for phase in ("generate", "train", "sync", "save")
            if (key := f"perf/{phase}_time") in values
        )  # fmt: skip
        print(f"rollout {rollout_id}/{self.plan.recipe.rollout.num_rollout}: {text}; {times}", flush=True)


def saves_after(recipe: Recipe, rollout_id: int) -> bool:
    """True every `--save-interval` rollouts, and after the last one."""
    last = rollout_id == recipe.rollout.num_rollout - 1
    interval = recipe.checkpoint.save_interval
    return last or (isinstance(interval, int) and (rollout_id + 1) % interval == 0)


def evaluates_before(recipe: Recipe, rollout_id: int) -> bool:
    """True before the first rollout and every `--eval-interval` rollouts; `num_rollout` means the end of the run.

    Never with `--eval-job`, which evaluates checkpoints instead.
    """
    interval = recipe.eval.eval_interval
    if interval is None or not recipe.eval.eval_prompt_data or recipe.eval.eval_job:
        return False
    return rollout_id % interval == 0 or rollout_id == recipe.rollout.num_rollout
