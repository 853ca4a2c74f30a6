"""The reinforcement-learning loop, top to bottom: generate, train, save, sync, evaluate."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from vime.observe.samples import write_samples
from vime.observe.throughput import tokens_per_gpu
from vime.rollout.kept import KeptRollouts
from vime.rollout.sampler import Sampler
from vime.run.control import answer_checkpoint, checkpoint_requested
from vime.run.routes import remove_routes, routes_path
from vime.samples import Rollout
from vime.sync.ranks import TrainerCall, WorkerMethods
from vime.train.exports import Exports
from vime.train.phases import Phases
from vime.train.results import Results
from vime.train.saves import SaveSchedule
from vime.train.spike_guard import Spike, SpikeGuard
from vime.train.supervisor import EngineSupervisor

SAVE_POLL_SECONDS = 10.0


class Loop:
    """Rollouts of a run whose trainer, engines and sampler are up (`vime.train.driver`)."""

    def __init__(self, phases: Phases, trainer: TrainerCall, sampler: Sampler, supervisor: EngineSupervisor) -> None:
        self.phases, self.trainer, self.sampler, self.supervisor = phases, trainer, sampler, supervisor
        self.plan, self.recipe, self.deadlines = phases.plan, phases.plan.recipe, phases.deadlines
        checkpoint = self.recipe.checkpoint
        self._kept = KeptRollouts(self.plan.run_dir, checkpoint.save if checkpoint.save_interval else None)
        self._saves = SaveSchedule(self.plan)
        self._guard = SpikeGuard(self.plan, 0)
        self.exports = Exports(self.plan, deadline_s=self.deadlines.save)
        self.results = Results(self.plan.run_dir, phases.metrics)
        self._before_generation: dict[str, Any] = {}
        """The sampler's state when the newest rollout began, for a checkpoint of the rollout before it."""

    async def run(self, first: int) -> None:
        """Every rollout from its generation to its report. Engines with GPUs of their own are one rollout ahead."""
        self._guard = SpikeGuard(self.plan, first)
        ahead: asyncio.Task[Rollout] | None = None
        last = self.recipe.rollout.num_rollout - 1
        try:
            for rollout_id in range(first, last + 1):
                await self.phases.evaluate_if_due(self.sampler, rollout_id)
                rollout = await (ahead or self._generation(rollout_id))
                ahead = self._generation(rollout_id + 1) if self._runs_ahead and rollout_id < last else None
                if await self._learn(rollout, ahead):
                    return
            await self._finish_save()
            await self.phases.evaluate_if_due(self.sampler, last + 1)
            await self.exports.finish()
            await self.results.take()
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    @property
    def _runs_ahead(self) -> bool:
        return not self.recipe.resources.colocate and self.recipe.rollout.max_staleness > 0

    def _generation(self, rollout_id: int) -> asyncio.Task[Rollout]:
        """A rollout under way. A run that is resumed before its end generates the same prompts again."""
        self._before_generation = self.sampler.state_dict()
        return asyncio.create_task(self._generate(rollout_id))

    async def _generate(self, rollout_id: int) -> Rollout:
        """The rollout, from the run folder if an earlier start finished it but did not save the weights after it."""
        # Routes are too large to be kept behind training, so a rollout that lacks them is generated again.
        replays = self.recipe.algorithm.use_rollout_routing_replay
        whole = not replays or routes_path(self.plan.run_dir, rollout_id).exists()
        if whole and (kept := await asyncio.to_thread(self._kept.read, rollout_id)) is not None:
            self.sampler.load_state_dict(kept.sampler)
            print(f"rollout {rollout_id} was finished by an earlier start and is not generated again", flush=True)
            return kept.rollout
        rollout = await self.phases.generation(self.sampler, rollout_id)
        await asyncio.to_thread(self._kept.write, rollout, self.sampler.state_dict())
        return rollout

    async def _learn(self, rollout: Rollout, ahead: asyncio.Task[Rollout] | None) -> bool:
        """Train on a rollout, save, give the engines the weights; whether the run shall stop here."""
        rollout_id = rollout.rollout_id
        write_samples(self.plan.run_dir, rollout, everything=self.recipe.misc.save_debug_rollout_data)
        if ahead is None:
            await self.sampler.settled()
            await self.supervisor.to_trainer()
        self.phases.record_rewards(self.sampler, rollout_id)
        async with self.supervisor.turn:
            trained = await self.phases.train(self.trainer, rollout)
            self.supervisor.version = rollout_id + 1
        if not self.recipe.misc.save_debug_rollout_data:
            await asyncio.to_thread(remove_routes, self.plan.run_dir, rollout_id)
        measured = {**rollout.metrics, **trained}
        try:
            self._guard.judge(rollout_id, measured, rollout.rows)
        except Spike:
            await asyncio.to_thread(self._kept.drop, rollout_id)
            raise
        # Before the checkpoint: a run that resumes there does not train this rollout again.
        self.phases.metrics.write(rollout_id, measured)
        saved = await self._save(rollout_id, ahead) if self._must_save(rollout_id) else None
        if ahead is not None:
            # A sync under way would mix weights inside the answers of the rollout that is ahead.
            await asyncio.wait([ahead])
        synced = await self.sync()
        times = self.phases.timeline.take_metrics()
        speed = tokens_per_gpu(self.plan, rollout, sum(times.values()))
        afterwards = {**synced, **times, **speed}
        self.phases.metrics.write(rollout_id, afterwards)
        self.phases.print_line(rollout_id, {**measured, **afterwards})
        if saved is not None and checkpoint_requested(self.plan.run_dir):
            await self._finish_save()
            answer_checkpoint(self.plan.run_dir, rollout_id, saved)
            print(f"checkpoint {saved} written on request; stopping after rollout {rollout_id}", flush=True)
            return True
        return False

    def _must_save(self, rollout_id: int) -> bool:
        return self._saves.due(rollout_id) or checkpoint_requested(self.plan.run_dir)

    async def _save(self, rollout_id: int, ahead: asyncio.Task[Rollout] | None) -> str:
        state = self.sampler.state_dict() if ahead is None else self._before_generation
        started = time.monotonic()
        async with self.supervisor.turn:
            with self.phases.timeline.phase("save", rollout_id):
                extra = {"sampler": state}
                paths = await self.trainer(self.deadlines.save, WorkerMethods.save, rollout_id, extra)
        self._saves.saved(time.monotonic() - started)
        print(f"rollout {rollout_id}: checkpoint {paths[0]}", flush=True)
        self.exports.saved(rollout_id)
        return paths[0]

    async def _finish_save(self) -> None:
        """Until the last checkpoint is published: one that is written in the background may still be under way."""
        async with self.supervisor.turn:
            await self.trainer(self.deadlines.save, WorkerMethods.finish_save)

    async def publish_saves(self) -> None:
        """Publish what was written in the background, also while the engines generate for long."""
        while True:
            await asyncio.sleep(SAVE_POLL_SECONDS)
            async with self.supervisor.turn:
                await self.trainer(self.deadlines.save, WorkerMethods.poll_save)

    async def sync(self) -> dict[str, float]:
        """Give the engines the trainer's weights; the version is the number of rollouts that were trained on."""
        await self.sampler.settled()
        with self.phases.timeline.phase("sync", self.supervisor.version):
            return await self.supervisor.sync()
