"""Driver of a run: starts actors, engines and sampler, then runs the loop or one of the debug modes."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

from vime.agents.choose import agent_of
from vime.observe.samples import read_rollout, write_samples
from vime.rollout.client import EngineClient, EngineError
from vime.rollout.command import TEACHER_NAME
from vime.rollout.dispatch import Patience
from vime.rollout.evaluator import Evaluator
from vime.rollout.sampler import Sampler
from vime.rollout.session import Agent
from vime.rollout.teacher import CONCURRENCY, Teacher
from vime.run.evaluations import Result, write_result
from vime.run.messages import report
from vime.run.plan import Binding, Evaluation, Plan
from vime.run.tokens import GROUP_KEY, read_token
from vime.run.usage import write_queues
from vime.sync.ranks import StartState, TrainerCall, WorkerMethods
from vime.sync.session import WeightSync
from vime.train.actors import EngineGroup, TrainerGroup, master
from vime.train.causes import watch_nodes
from vime.train.deadlines import PhaseDeadlines
from vime.train.exports import Exports
from vime.train.exposition import Exposition
from vime.train.former import settle, wait_for_names
from vime.train.handover import SLEEP_LEVEL, Handover
from vime.train.loop import Loop
from vime.train.phases import Phases, saves_after
from vime.train.placement import reserve
from vime.train.pulse import Pulse
from vime.train.results import deliver, write
from vime.train.supervisor import EngineSupervisor, RecoveryDeadlines
from vime.train.teachers import TeacherKeeper
from vime.train.tool_nodes import ToolNodes
from vime.train.trust import PROBES

T = TypeVar("T")

BEAT_SECONDS = 10.0
"""Interval between two `alive` reports to the controller."""
QUEUES_SECONDS = 10.0
"""Interval between two writes of the engines' queues."""


async def _beat() -> None:
    """Report `alive` to the controller as long as the event loop runs."""
    while True:
        report("alive")
        await asyncio.sleep(BEAT_SECONDS)


class Driver:
    """One run, from an empty Ray cluster to the last checkpoint."""

    def __init__(self, plan: Plan, binding: Binding, api_key: str, deadlines: PhaseDeadlines | None = None) -> None:
        self.plan, self.recipe, self.binding = plan, plan.recipe, binding
        self.api_key = api_key
        self.exposition = Exposition(plan) if plan.recipe.profile.prometheus else None
        self.phases = Phases.of(plan, deadlines, live=self.exposition)
        self.deadlines = limits = self.phases.deadlines
        key = read_token(plan.run_dir, GROUP_KEY).encode()
        self.pulse = Pulse(plan, binding, key, silent_s=limits.silent, stuck_s=limits.stuck)
        self._start_times: dict[str, float] = {}
        """Seconds until the engines, and the trainer, were up."""

    async def run(self) -> None:
        """Train, or run the mode of a debug flag."""
        try:
            async with self.exposition or contextlib.nullcontext(), asyncio.TaskGroup() as tasks:
                watched = (watch_nodes(self.plan, self.binding), self.pulse.watch(), _beat())
                watches = [tasks.create_task(watch) for watch in watched]
                await self._run(await reserve(self.plan, deadline_s=self.deadlines.placement))
                for watch in watches:
                    watch.cancel()
        finally:
            self.pulse.close()
            self.phases.close()

    def _engines(self, group: Any) -> EngineGroup:
        return EngineGroup(self.plan, self.binding, group)

    async def _run(self, group: Any) -> None:
        if self.plan.evaluation is not None:
            await self._evaluate_only(group, self.plan.evaluation)
        elif folder := self.recipe.misc.load_debug_rollout_data:
            await self._train_only(group, folder)
        elif self.recipe.misc.debug_rollout_only:
            await self._rollout_only(group)
        else:
            await self._train(group)

    async def _train(self, group: Any) -> None:
        trainer, engines = TrainerGroup(self.plan, group, await wait_for_names()), self._engines(group)
        async with _stopped_afterwards(engines), contextlib.AsyncExitStack() as stack:
            with self.phases.timeline.phase("start", -1):
                async with asyncio.TaskGroup() as tasks:
                    teaching = tasks.create_task(self._teacher(stack, group))
                    start, clients = await self._start(stack, trainer, engines)
                loop = await self._connect(stack, trainer.call, engines, clients, teaching.result())
            first = start.next_rollout_id
            print(f"weights from {start.loaded_from}; first rollout {first}", flush=True)
            if start.extra:
                loop.sampler.load_state_dict(start.extra["sampler"])
            loop.supervisor.version = first
            synced = await loop.sync()
            # Taken here, so that the first rollout's times hold nothing of the start.
            times = self.phases.timeline.take_metrics()
            self.phases.metrics.start(first)
            started = {**synced, **times, **self._start_times}
            self.phases.metrics.write(first, {f"start/{name}": value for name, value in started.items()})
            if first > 0:
                loop.exports.resume(first - 1)
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(loop.supervisor.watch(loop.sampler.engine_failed))]
                background.append(tasks.create_task(self._note_queues(loop.sampler)))
                background.append(tasks.create_task(loop.exports.run()))
                background.append(tasks.create_task(loop.results.run()))
                if self.recipe.checkpoint.async_save:
                    background.append(tasks.create_task(loop.publish_saves()))
                await loop.run(first)
                for task in background:
                    task.cancel()

    async def _note_queues(self, sampler: Sampler) -> None:
        """Write the engines' queues for `vime.top`. In a thread, since a shared file system may be slow."""
        while True:
            await asyncio.to_thread(write_queues, self.plan.run_dir, sampler.loads())
            await asyncio.sleep(QUEUES_SECONDS)

    async def _start(
        self, stack: contextlib.AsyncExitStack, trainer: TrainerGroup, engines: EngineGroup
    ) -> tuple[StartState, list[EngineClient]]:
        """Start engines and trainer; one after the other if they share GPUs, since each expects them empty."""
        ranks_up = asyncio.ensure_future(trainer.beat(self.deadlines.setup, self.pulse.place))
        if trainer.former:
            # A rank that is up has seen the end of those that held its GPU before, and holds nothing of it yet.
            await ranks_up
        engines_up = self._timed("engines_time", self._engines_up(stack, engines))
        if self.recipe.resources.colocate:
            _, clients = await asyncio.gather(ranks_up, engines_up)
            await asyncio.gather(*(client.sleep(SLEEP_LEVEL) for client in clients))
            return await self._timed("trainer_time", self._trainer_up(trainer, ranks_up)), clients
        trainer_up = self._timed("trainer_time", self._trainer_up(trainer, ranks_up))
        start, clients = await asyncio.gather(trainer_up, engines_up)
        return start, clients

    async def _engines_up(self, stack: contextlib.AsyncExitStack, engines: EngineGroup) -> list[EngineClient]:
        """Start the engines; those that an earlier driver left are as if they had just started."""
        clients = await self._clients(stack, await engines.start(deadline_s=self.deadlines.engine_start))
        await self._settle(engines, clients)
        return clients

    async def _settle(self, engines: EngineGroup, clients: list[EngineClient], *, teaches: bool = False) -> None:
        """Bring the engines that were found to the state of those that were started; start one again that fails."""

        async def one(engine: int) -> None:
            try:
                await settle(clients[engine], sleeps=self.recipe.resources.colocate and not teaches, learns=not teaches)
            except EngineError as error:
                print(f"engine {engine} of an earlier driver is started again: {error}", flush=True)
                await engines.restart([engine], deadline_s=self.deadlines.engine_start)

        if engines.found:
            print(f"{clients[0].model} engines found running: {', '.join(map(str, engines.found))}", flush=True)
        await asyncio.gather(*map(one, engines.found))

    async def _teacher(self, stack: contextlib.AsyncExitStack, group: Any) -> Teacher | None:
        """The plan's teacher, once all of its engines answer; they are stopped with the stack. None without one."""
        planned, limit = self.plan.teacher, self.deadlines.engine_start
        if planned is None:
            return None
        servers = EngineGroup(self.plan, self.binding, group, planned.engines)
        await stack.enter_async_context(_stopped_afterwards(servers))
        urls = await self._timed("teacher_time", servers.start(deadline_s=limit))
        clients = [EngineClient(url, self.api_key, concurrency=CONCURRENCY, model=TEACHER_NAME) for url in urls]
        for client in clients:
            await stack.enter_async_context(client)
        await self._settle(servers, clients, teaches=True)
        keeper = TeacherKeeper(self.plan, servers, deadline_s=limit)
        patience = self.recipe.teacher.opd_teacher_patience
        return Teacher(planned.path, clients, patience_s=patience, recover=keeper.recover)

    async def _timed(self, name: str, work: Awaitable[T]) -> T:
        began = time.monotonic()
        try:
            return await work
        finally:
            self._start_times[name] = time.monotonic() - began

    async def _trainer_up(self, trainer: TrainerGroup, ranks_up: Awaitable[None]) -> StartState:
        """Set up the ranks, once their processes are up."""
        await ranks_up
        place = master(self.plan, self.binding)
        return (await trainer.call(self.deadlines.setup, WorkerMethods.setup, *place))[0]

    async def _clients(self, stack: contextlib.AsyncExitStack, urls: list[str]) -> list[EngineClient]:
        limit = self.recipe.engine.vllm_server_concurrency
        found = [await stack.enter_async_context(EngineClient(url, self.api_key, concurrency=limit)) for url in urls]
        if self.exposition is not None:
            self.exposition.follow(found)
        return found

    async def _agent(self, stack: contextlib.AsyncExitStack) -> Agent | None:
        """The running holder of conversations; None for answers of one turn."""
        agent = agent_of(self.recipe, ToolNodes(self.plan) if self.recipe.agent.runs_python else None)
        return None if agent is None else await stack.enter_async_context(agent)

    async def _connect(
        self,
        stack: contextlib.AsyncExitStack,
        call: TrainerCall,
        engines: EngineGroup,
        clients: list[EngineClient],
        teacher: Teacher | None,
    ) -> Loop:
        """Make the loop, with a sampler and a supervisor of these engines."""
        limits = self.deadlines
        # A recovery may have to wait for the trainer before its sync.
        patience = Patience(
            recovery=limits.engine_start + limits.train + limits.save + 2 * limits.sync,
            # A stall is found and the engine restarted within the timeout of a rollout.
            stall=min(Patience.stall, self.recipe.rollout.rollout_timeout / 3),
        )

        async def recover(engine: int, error: EngineError) -> None:
            with self.phases.timeline.phase("recover", supervisor.version):
                await supervisor.recover(engine, error)

        agent = await self._agent(stack)
        sampler = Sampler(self.plan, clients, recover=recover, patience=patience, agent=agent, teacher=teacher)
        await stack.enter_async_context(sampler)
        supervisor = EngineSupervisor(
            self.plan,
            engines,
            clients,
            WeightSync(self.plan, call, clients, binding=self.binding),
            call,
            Handover(self.plan, call, clients, asleep=self.recipe.resources.colocate),
            sampler.probes(PROBES),
            RecoveryDeadlines(engine_start=limits.engine_start, sync=limits.sync),
        )
        return Loop(self.phases, call, sampler, supervisor)

    async def _evaluate_only(self, group: Any, evaluation: Evaluation) -> None:
        """Evaluate the weights that the engines loaded, and give the values to the run that they belong to."""
        engines, number = self._engines(group), evaluation.rollout_id
        async with _stopped_afterwards(engines), contextlib.AsyncExitStack() as stack:
            with self.phases.timeline.phase("start", -1):
                urls = await engines.start(deadline_s=self.deadlines.engine_start)
            evaluator = Evaluator(self.plan, await self._clients(stack, urls), agent=await self._agent(stack))
            await stack.enter_async_context(evaluator)
            with self.phases.timeline.phase("eval", number):
                values = await evaluator.evaluate(number)
        result = Result(number, values, evaluation.weights_time)
        write(self.phases.metrics, result)
        folder = Path(self.plan.run_dir)
        write_result(folder, result)
        if evaluation.run_dir is not None:
            await asyncio.to_thread(deliver, folder, evaluation.run_dir, result)
        if evaluation.temporary:
            await asyncio.to_thread(shutil.rmtree, evaluation.weights, ignore_errors=True)

    async def _train_only(self, group: Any, folder: str) -> None:
        """Train on rollouts that another run wrote."""
        trainer = TrainerGroup(self.plan, group, await wait_for_names())
        start = await self._trainer_up(trainer, trainer.beat(self.deadlines.setup, self.pulse.place))
        self.phases.metrics.start(start.next_rollout_id)
        exports = Exports(self.plan, deadline_s=self.deadlines.save)
        exporting = asyncio.create_task(exports.run())
        try:
            for rollout_id in range(start.next_rollout_id, self.recipe.rollout.num_rollout):
                trained = await self.phases.train(trainer.call, read_rollout(folder, rollout_id))
                if saves_after(self.recipe, rollout_id):
                    await trainer.call(self.deadlines.save, WorkerMethods.save, rollout_id, start.extra)
                    exports.saved(rollout_id)
                self.phases.report(rollout_id, {**trained, **self.phases.timeline.take_metrics()})
            await trainer.call(self.deadlines.save, WorkerMethods.finish_save)
            await exports.finish()
        finally:
            exporting.cancel()

    async def _rollout_only(self, group: Any) -> None:
        """Generate with the weights that the engines loaded, and write the rollouts."""
        engines = self._engines(group)
        async with _stopped_afterwards(engines), contextlib.AsyncExitStack() as stack:
            async with asyncio.TaskGroup() as tasks:
                teaching = tasks.create_task(self._teacher(stack, group))
                clients = await self._clients(stack, await engines.start(deadline_s=self.deadlines.engine_start))
            agent, teacher = await self._agent(stack), teaching.result()
            sampler = Sampler(self.plan, clients, agent=agent, teacher=teacher)
            await stack.enter_async_context(sampler)
            for rollout_id in range(self.recipe.rollout.num_rollout):
                await self.phases.evaluate_if_due(sampler, rollout_id)
                rollout = await self.phases.generation(sampler, rollout_id)
                write_samples(self.plan.run_dir, rollout, everything=True)
                self.phases.report(rollout_id, {**rollout.metrics, **self.phases.timeline.take_metrics()})


@contextlib.asynccontextmanager
async def _stopped_afterwards(engines: EngineGroup) -> AsyncIterator[None]:
    """Stop the engines at the end of the block. An error leaves them to the next driver, or to the end of Ray."""
    yield
    await engines.stop()
