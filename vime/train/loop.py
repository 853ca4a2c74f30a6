"""The reinforcement-learning loop, top to bottom: generate, train, save, sync, evaluate."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from vime.observe.samples import read_rollout, write_samples
from vime.observe.throughput import tokens_per_gpu
from vime.observe.timeline import Span, Timeline
from vime.recipe.schema import Recipe
from vime.rollout.client import EngineClient, EngineError
from vime.rollout.dispatch import Patience
from vime.rollout.sampler import Sampler
from vime.run.control import answer_checkpoint, checkpoint_requested
from vime.run.metrics import MetricsWriter
from vime.run.plan import Binding, Plan
from vime.samples import Rollout
from vime.sync.session import WeightSync
from vime.train.actors import EngineGroup, TrainerGroup, master
from vime.train.deadlines import PhaseDeadlines
from vime.train.handover import Handover
from vime.train.placement import reserve
from vime.train.supervisor import EngineSupervisor, RecoveryDeadlines
from vime.train.trust import PROBES

SAVE_POLL_SECONDS = 10.0


class Loop:
    """One run's driver: owns the actors, the sampler and the writers of metrics and timeline."""

    def __init__(self, plan: Plan, binding: Binding, api_key: str, deadlines: PhaseDeadlines | None = None) -> None:
        self.plan, self.recipe, self.binding = plan, plan.recipe, binding
        self.api_key = api_key
        self.deadlines = deadlines or PhaseDeadlines.of(plan)
        self.timeline = Timeline(plan.run_dir)
        self.metrics = MetricsWriter(
            plan.run_dir,
            run_name=plan.run_name,
            wandb_project=(self.recipe.misc.wandb_project or "vime") if self.recipe.misc.use_wandb else None,
            config=self.recipe.model_dump(),
        )

    async def run(self) -> None:
        """From an empty Ray cluster to the last checkpoint."""
        try:
            await self._run(await reserve(self.plan, deadline_s=self.deadlines.placement))
        finally:
            self.metrics.close()
            self.timeline.close()

    async def _run(self, group: Any) -> None:
        if folder := self.recipe.misc.load_debug_rollout_data:
            await self._train_only(group, folder)
        elif self.recipe.misc.debug_rollout_only:
            await self._rollout_only(group)
        else:
            async with self._actors(group) as first, asyncio.TaskGroup() as tasks:
                beside = [tasks.create_task(self.supervisor.watch(self.sampler.engine_failed))]
                if self.recipe.checkpoint.async_save:
                    beside.append(tasks.create_task(self._publish_saves()))
                await self._rollouts(first)
                for task in beside:
                    task.cancel()

    @contextlib.asynccontextmanager
    async def _actors(self, group: Any) -> AsyncIterator[int]:
        """Trainer, engines and sampler, up and in step; yields the number of the first rollout."""
        self.trainer = TrainerGroup(self.plan, group)
        self.engines = EngineGroup(self.plan, group)
        try:
            async with contextlib.AsyncExitStack() as stack:
                with self.timeline.phase("start", -1):
                    start = await self._start(stack)
                print(f"weights from {start.loaded_from}; first rollout {start.next_rollout_id}", flush=True)
                if start.extra:
                    self.sampler.load_state_dict(start.extra["sampler"])
                self.supervisor.version = start.next_rollout_id
                synced = await self._sync()
                self.metrics.write(start.next_rollout_id, {f"start/{name}": value for name, value in synced.items()})
                yield start.next_rollout_id
        except BaseException as error:
            try:
                await self.engines.stop()
            except Exception as second:  # noqa: BLE001 -- what ended the run is its last word, not what followed
                error.add_note(f"then the engines were not stopped: {type(second).__name__}: {second}")
            raise
        await self.engines.stop()

    async def _start(self, stack: contextlib.AsyncExitStack) -> Any:
        """Engines and trainer up: one after the other where they share GPUs, each of which expects them empty."""
        limits = self.deadlines

        async def trainer_up() -> Any:
            place = master(self.plan, self.binding)
            return (await self.trainer.call("setup", *place, deadline_s=limits.setup))[0]

        engines_up = self.engines.start(deadline_s=limits.engine_start)
        if self.recipe.resources.colocate:
            clients = await self._clients(stack, await engines_up)
            await asyncio.gather(*(client.sleep() for client in clients))
            start = await trainer_up()
        else:
            start, urls = await asyncio.gather(trainer_up(), engines_up)
            clients = await self._clients(stack, urls)
        await self._connect(stack, clients)
        return start

    async def _clients(self, stack: contextlib.AsyncExitStack, urls: list[str]) -> list[EngineClient]:
        limit = self.recipe.engine.vllm_server_concurrency
        return [await stack.enter_async_context(EngineClient(url, self.api_key, concurrency=limit)) for url in urls]

    async def _connect(self, stack: contextlib.AsyncExitStack, clients: list[EngineClient]) -> None:
        """Sampler and supervisor of these engines."""
        limits = self.deadlines
        # A recovery may have to wait until the trainer has time for a sync.
        patience = Patience(recovery=limits.engine_start + limits.train + limits.save + 2 * limits.sync)
        sampler = Sampler(self.plan, clients, recover=self._recover, patience=patience)
        self.sampler = await stack.enter_async_context(sampler)
        self.supervisor = EngineSupervisor(
            self.plan,
            self.engines,
            clients,
            WeightSync(self.plan, self.trainer.call, clients, binding=self.binding),
            self.trainer.call,
            Handover(self.plan, self.trainer.call, clients, asleep=self.recipe.resources.colocate),
            self.sampler.probes(PROBES),
            RecoveryDeadlines(engine_start=limits.engine_start, sync=limits.sync),
        )

    async def _recover(self, engine: int, error: EngineError) -> None:
        with self.timeline.phase("recover", self.supervisor.version):
            await self.supervisor.recover(engine, error)

    async def _rollouts(self, first: int) -> None:
        """Every rollout from its generation to its report. Engines with GPUs of their own are one rollout ahead."""
        ahead: asyncio.Task[Rollout] | None = None
        last = self.recipe.rollout.num_rollout - 1
        try:
            for rollout_id in range(first, last + 1):
                await self._evaluate_if_due(rollout_id)
                rollout = await (ahead or self._generation(rollout_id))
                ahead = self._generation(rollout_id + 1) if self._runs_ahead and rollout_id < last else None
                if await self._learn(rollout, ahead):
                    return
            await self._finish_save()
            await self._evaluate_if_due(last + 1)
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)

    @property
    def _runs_ahead(self) -> bool:
        return not self.recipe.resources.colocate and self.recipe.rollout.max_staleness > 0

    def _generation(self, rollout_id: int) -> asyncio.Task[Rollout]:
        """A rollout under way. A run that is resumed before it generates the same prompts again."""
        self._before_generation = self.sampler.state_dict()

        async def generate() -> Rollout:
            with self.timeline.phase("generate", rollout_id):
                return await self.sampler.generate(rollout_id)

        return asyncio.create_task(generate())

    async def _learn(self, rollout: Rollout, ahead: asyncio.Task[Rollout] | None) -> bool:
        """Train on a rollout, save, give the engines the weights; whether the run shall stop here."""
        rollout_id = rollout.rollout_id
        write_samples(self.plan.run_dir, rollout, everything=self.recipe.misc.save_debug_rollout_data)
        if ahead is None:
            await self.sampler.settled()
            await self.supervisor.to_trainer()
        self._record_rewards(rollout_id)
        async with self.supervisor.turn:
            trained = await self._train(rollout)
            self.supervisor.version = rollout_id + 1
        # Before the checkpoint: a run that goes on from there does not train this rollout again.
        measured = {**rollout.metrics, **trained}
        self.metrics.write(rollout_id, measured)
        saved = await self._save(rollout_id, ahead) if self._must_save(rollout_id) else None
        if ahead is not None:
            # A sync under way would mix weights inside the answers of the rollout that is ahead.
            await asyncio.wait([ahead])
        synced = await self._sync()
        times = self.timeline.take_metrics()
        speed = tokens_per_gpu(self.plan, rollout, sum(times.values()))
        afterwards = {**synced, **times, **speed}
        self.metrics.write(rollout_id, afterwards)
        self._tell(rollout_id, {**measured, **afterwards})
        if saved is not None and checkpoint_requested(self.plan.run_dir):
            await self._finish_save()
            answer_checkpoint(self.plan.run_dir, rollout_id, saved)
            print(f"checkpoint {saved} written on request; stopping after rollout {rollout_id}", flush=True)
            return True
        return False

    async def _train_only(self, group: Any, folder: str) -> None:
        """Train on rollouts that another run wrote."""
        self.trainer = TrainerGroup(self.plan, group)
        place = master(self.plan, self.binding)
        start = (await self.trainer.call("setup", *place, deadline_s=self.deadlines.setup))[0]
        for rollout_id in range(start.next_rollout_id, self.recipe.rollout.num_rollout):
            trained = await self._train(read_rollout(folder, rollout_id))
            if saves_after(self.recipe, rollout_id):
                await self.trainer.call("save", rollout_id, start.extra, deadline_s=self.deadlines.save)
            self._report(rollout_id, {**trained, **self.timeline.take_metrics()})
        await self.trainer.call("finish_save", deadline_s=self.deadlines.save)

    async def _rollout_only(self, group: Any) -> None:
        """Generate with the weights that the engines loaded, and write it down."""
        self.engines = EngineGroup(self.plan, group)
        try:
            async with contextlib.AsyncExitStack() as stack:
                urls = await self.engines.start(deadline_s=self.deadlines.engine_start)
                sampler = Sampler(self.plan, await self._clients(stack, urls))
                self.sampler = await stack.enter_async_context(sampler)
                for rollout_id in range(self.recipe.rollout.num_rollout):
                    await self._evaluate_if_due(rollout_id)
                    rollout = await self._generation(rollout_id)
                    write_samples(self.plan.run_dir, rollout, everything=True)
                    self._report(rollout_id, {**rollout.metrics, **self.timeline.take_metrics()})
        finally:
            await self.engines.stop()

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

    async def _save(self, rollout_id: int, ahead: asyncio.Task[Rollout] | None) -> str:
        state = self.sampler.state_dict() if ahead is None else self._before_generation
        async with self.supervisor.turn:
            with self.timeline.phase("save", rollout_id):
                extra = {"sampler": state}
                paths = await self.trainer.call("save", rollout_id, extra, deadline_s=self.deadlines.save)
        print(f"rollout {rollout_id}: checkpoint {paths[0]}", flush=True)
        return paths[0]

    async def _finish_save(self) -> None:
        """Until the last checkpoint is published: one that is written in the background may still be under way."""
        async with self.supervisor.turn:
            await self.trainer.call("finish_save", deadline_s=self.deadlines.save)

    async def _publish_saves(self) -> None:
        """Publish what was written in the background, also while the engines generate for long."""
        while True:
            await asyncio.sleep(SAVE_POLL_SECONDS)
            async with self.supervisor.turn:
                await self.trainer.call("poll_save", deadline_s=self.deadlines.save)

    async def _sync(self) -> dict[str, float]:
        """Give the engines the trainer's weights; the version is the number of rollouts that were trained on."""
        await self.sampler.settled()
        with self.timeline.phase("sync", self.supervisor.version):
            return await self.supervisor.sync()

    async def _evaluate_if_due(self, rollout_id: int) -> None:
        if not evaluates_before(self.recipe, rollout_id):
            return
        with self.timeline.phase("eval", rollout_id):
            values = await self.sampler.evaluate(rollout_id)
        self._record_rewards(rollout_id)
        self.metrics.write(rollout_id, values)
        print(f"eval {rollout_id}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)

    def _report(self, rollout_id: int, values: dict[str, float]) -> None:
        self.metrics.write(rollout_id, values)
        self._tell(rollout_id, values)

    def _tell(self, rollout_id: int, values: dict[str, float]) -> None:
        shown = ("rollout/raw_reward", "train/loss", "train/grad_norm", "train/train_rollout_logprob_abs_diff")
        text = ", ".join(f"{name.split('/')[1]} {values[name]:.4g}" for name in shown if name in values)
        times = ", ".join(
            f"{phase} {values[key]:.1f} s" for phase in ("generate", "train", "sync", "save")
            if (key := f"perf/{phase}_time") in values
        )  # fmt: skip
        print(f"rollout {rollout_id}/{self.recipe.rollout.num_rollout}: {text}; {times}", flush=True)


def saves_after(recipe: Recipe, rollout_id: int) -> bool:
    """Every `--save-interval` rollouts, and after the last one."""
    last = rollout_id == recipe.rollout.num_rollout - 1
    interval = recipe.checkpoint.save_interval
    return last or (interval is not None and (rollout_id + 1) % interval == 0)


def evaluates_before(recipe: Recipe, rollout_id: int) -> bool:
    """Before the first rollout and every `--eval-interval` rollouts; `num_rollout` stands for the end of the run."""
    interval = recipe.eval.eval_interval
    if interval is None or not recipe.eval.eval_prompt_data:
        return False
    return rollout_id % interval == 0 or rollout_id == recipe.rollout.num_rollout
