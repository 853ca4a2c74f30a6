"""The reinforcement-learning loop, top to bottom: generate, train, save, sync, evaluate."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vime.errors import VimeError
from vime.observe.metrics import MetricsWriter
from vime.observe.samples import write_samples
from vime.observe.throughput import tokens_per_gpu
from vime.observe.timeline import Span, Timeline
from vime.planning.stages import DISK_BYTES_PER_S
from vime.planning.types import Binding, Plan
from vime.rollout.client import EngineClient
from vime.rollout.sampler import Sampler
from vime.rollout.types import Rollout
from vime.sync.session import WeightSync
from vime.train.actors import EngineGroup, TrainerGroup, master
from vime.train.control import answer_checkpoint, checkpoint_requested
from vime.train.placement import reserve
from vime.train.schedule import evaluates_before, saves_after

# Trainer and engine compute in different types and kernels; above this mean difference they hold different weights.
TRUSTED_LOGPROB_DIFFERENCE = 0.1
ENGINE_POLL_SECONDS = 5.0


class EngineDied(VimeError):
    """An engine's server process ended while the run needed it."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds after which a phase has failed."""

    placement: float = 120.0
    setup: float = 1800.0
    engine_start: float = 1800.0
    train: float = 7200.0
    save: float = 1800.0
    sync: float = 1800.0

    @classmethod
    def of(cls, plan: Plan) -> Deadlines:
        """Phases that read or write a whole checkpoint also have the time that its bytes take on a slow file system."""
        train = next(stage for stage in plan.stages if stage.name == "train")
        size = {artefact.kind: artefact.bytes or 0 for artefact in (*train.inputs, *train.outputs)}
        trained = max(size.get("torch_dist", 0), size.get("hf", 0))
        served = min((len(engine.nodes) for engine in plan.engines), default=1)
        return cls(
            setup=cls.setup + _disk_seconds(trained, len(plan.nodes)),
            engine_start=cls.engine_start + _disk_seconds(size.get("hf", 0), served),
            save=cls.save + _disk_seconds(size.get("run", 0), len(plan.nodes)),
        )


def _disk_seconds(size: int, nodes: int) -> float:
    return size / (nodes * DISK_BYTES_PER_S)


class Loop:
    """One run's driver: owns the actors, the sampler and the writers of metrics and timeline."""

    def __init__(self, plan: Plan, binding: Binding, api_key: str, deadlines: Deadlines | None = None) -> None:
        self.plan, self.recipe, self.binding = plan, plan.recipe, binding
        self.api_key = api_key
        self.deadlines = deadlines or Deadlines.of(plan)
        self.timeline = Timeline(plan.run_dir)
        self.metrics = MetricsWriter(
            plan.run_dir,
            run_name=plan.run_name,
            wandb_project=(self.recipe.misc.wandb_project or "vime") if self.recipe.misc.use_wandb else None,
            config=self.recipe.model_dump(),
        )

    async def run(self) -> None:
        """From an empty Ray cluster to the last checkpoint."""
        group = await reserve(self.plan, deadline_s=self.deadlines.placement)
        async with self._actors(group) as first, asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch_engines())
            await self._rollouts(first)
            watch.cancel()

    @contextlib.asynccontextmanager
    async def _actors(self, group: Any) -> AsyncIterator[int]:
        """Trainer, engines and sampler, up and in step; yields the number of the first rollout."""
        self.trainer = TrainerGroup(self.plan, group)
        self.engines = EngineGroup(self.plan, group)
        try:
            with self.timeline.phase("start", -1):
                starts, urls = await asyncio.gather(
                    self.trainer.call("setup", *master(self.plan, self.binding), deadline_s=self.deadlines.setup),
                    self.engines.start(deadline_s=self.deadlines.engine_start),
                )
            start = starts[0]
            print(f"weights from {start.loaded_from}; first rollout {start.next_rollout_id}", flush=True)
            async with contextlib.AsyncExitStack() as stack:
                limit = self.recipe.engine.vllm_server_concurrency
                clients = [
                    await stack.enter_async_context(EngineClient(url, self.api_key, concurrency=limit)) for url in urls
                ]
                self.sampler = await stack.enter_async_context(Sampler(self.plan, clients))
                if start.extra:
                    self.sampler.load_state_dict(start.extra["sampler"])
                self.sync = WeightSync(self.plan, self.trainer.call, clients, binding=self.binding)
                await self._sync(start.next_rollout_id)
                yield start.next_rollout_id
        finally:
            await self.engines.stop()
            self.metrics.close()
            self.timeline.close()

    async def _rollouts(self, first: int) -> None:
        for rollout_id in range(first, self.recipe.rollout.num_rollout):
            await self._evaluate_if_due(rollout_id)
            with self.timeline.phase("generate", rollout_id):
                rollout = await self.sampler.generate(rollout_id)
            self._record_rewards(rollout_id)
            trained = await self._train(rollout)
            saved = await self._save(rollout_id) if self._must_save(rollout_id) else None
            synced = await self._sync(rollout_id + 1)
            write_samples(self.plan.run_dir, rollout, everything=self.recipe.misc.save_debug_rollout_data)
            times = self.timeline.take_metrics()
            speed = tokens_per_gpu(self.plan, rollout, sum(times.values()))
            self._report(rollout_id, {**rollout.metrics, **trained, **synced, **times, **speed})
            if saved is not None and checkpoint_requested(self.plan.run_dir):
                answer_checkpoint(self.plan.run_dir, rollout_id, saved)
                print(f"checkpoint {saved} written on request; stopping after rollout {rollout_id}", flush=True)
                return
        await self._evaluate_if_due(self.recipe.rollout.num_rollout)

    def _must_save(self, rollout_id: int) -> bool:
        return saves_after(self.recipe, rollout_id) or checkpoint_requested(self.plan.run_dir)

    async def _train(self, rollout: Rollout) -> dict[str, float]:
        import ray

        with self.timeline.phase("train", rollout.rollout_id):
            stored = ray.put(rollout)
            results = await self.trainer.call("train", stored, deadline_s=self.deadlines.train)
        self.timeline.add_ranks(rollout.rollout_id, await self.trainer.call("take_spans", deadline_s=60))
        return results[0]

    def _record_rewards(self, rollout_id: int) -> None:
        for name, start, end in self.sampler.take_spans():
            self.timeline.add(Span(name, rollout_id, "rewards", start, end))

    async def _save(self, rollout_id: int) -> str:
        with self.timeline.phase("save", rollout_id):
            extra = {"sampler": self.sampler.state_dict()}
            paths = await self.trainer.call("save", rollout_id, extra, deadline_s=self.deadlines.save)
        print(f"rollout {rollout_id}: checkpoint {paths[0]}", flush=True)
        return paths[0]

    async def _sync(self, version: int) -> dict[str, float]:
        """Give the engines the trainer's weights; the version is the number of the rollout they will generate."""
        with self.timeline.phase("sync", version):
            return await asyncio.wait_for(self.sync.run(version), self.deadlines.sync)

    async def _evaluate_if_due(self, rollout_id: int) -> None:
        if not evaluates_before(self.recipe, rollout_id):
            return
        with self.timeline.phase("eval", rollout_id):
            values = await self.sampler.evaluate(rollout_id)
        self.metrics.write(rollout_id, values)
        print(f"eval {rollout_id}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)

    async def _watch_engines(self) -> None:
        while True:
            dead = await self.engines.exited()
            if dead is not None:
                index, code = dead
                raise EngineDied(
                    f"engine {index} exited with {code}: see {self.plan.run_dir}/logs/engines for its last words"
                )
            await asyncio.sleep(ENGINE_POLL_SECONDS)

    def _report(self, rollout_id: int, values: dict[str, float]) -> None:
        self.metrics.write(rollout_id, values)
        shown = ("rollout/raw_reward", "train/loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff")
        text = ", ".join(f"{name.split('/')[1]} {values[name]:.4g}" for name in shown if name in values)
        times = ", ".join(
            f"{phase} {values[key]:.1f} s" for phase in ("generate", "train", "sync", "save")
            if (key := f"perf/{phase}_time") in values
        )  # fmt: skip
        print(f"rollout {rollout_id}/{self.recipe.rollout.num_rollout}: {text}; {times}", flush=True)
