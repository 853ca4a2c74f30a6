"""Keeps a run's engines running, trusted and on the trainer's current weights; restarts those that fail."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vime.errors import Cause, DeadlineExceeded, VimeError
from vime.rollout.client import EngineClient, EngineError, EngineTimeout, EngineUnreachable
from vime.run.plan import Plan
from vime.sync.ranks import TrainerCall, WorkerMethods
from vime.sync.session import SyncFailed
from vime.train.causes import cause_of
from vime.train.handover import EngineStuck, Handover
from vime.train.trust import EngineDistrusted, check_trust, differences, probe_settings

POLL_SECONDS = 5.0
PROBE_SECONDS = 120.0


class EngineLost(VimeError):
    """An engine failed more often than the limit of restarts."""

    def __init__(self, text: str, cause: Cause) -> None:
        super().__init__(text)
        self.cause = cause


class Servers(Protocol):
    """Server processes of all engines (`vime.train.actors.EngineGroup`)."""

    async def restart(self, engines: Sequence[int], *, deadline_s: float) -> None: ...
    async def exited(self) -> list[tuple[int, str]]: ...


class Sync(Protocol):
    """Interface of `vime.sync.session.WeightSync`."""

    async def run(self, version: int) -> dict[str, float]: ...
    def restarted(self, engine: int, client: Any) -> None: ...


@dataclass(frozen=True)
class RecoveryDeadlines:
    """Seconds after which a step has failed."""

    engine_start: float = 1800.0
    sync: float = 1800.0
    probe: float = PROBE_SECONDS
    log_probs: float = 600.0


class EngineSupervisor:
    """Performs all operations on engines except generation, one at a time.

    `turn` must be held while using the trainer, which also does one thing at a time.
    """

    def __init__(
        self,
        plan: Plan,
        servers: Servers,
        clients: Sequence[EngineClient],
        sync: Sync,
        trainer: TrainerCall,
        handover: Handover,
        prompts: Sequence[list[int]],
        deadlines: RecoveryDeadlines | None = None,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self._plan, self._servers, self._clients = plan, servers, list(clients)
        self._sync, self._trainer, self._prompts = sync, trainer, list(prompts)
        self._handover = handover
        self._deadlines, self._say = deadlines or RecoveryDeadlines(), say
        self.turn = asyncio.Lock()
        self._care = asyncio.Lock()
        self.version = 0
        """Version of the trainer's weights: number of rollouts trained on. Set by the training loop, under `turn`."""
        self._restarts: Counter[int] = Counter()
        self._synced = False
        self.restarts = 0
        """Restarts since the last `sync`."""

    async def sync(self) -> dict[str, float]:
        """Send the trainer's weights to all engines, check that they compute the same, return metrics `sync/…`.

        An engine that fails meanwhile is restarted and loaded whole. Raises EngineLost, SyncFailed if the trainer
        failed, EngineDistrusted if engines never agreed with the trainer.
        """
        async with self._care, self.turn:
            for engine, how in () if self._handover.trainer_has_them else await self._servers.exited():
                await self._restart([engine], engine, EngineUnreachable(f"engine {engine} {how}"))
            await self._handed(self._handover.room_for_weights)
            metrics = await self._load(range(len(self._clients)))
        self._restarts.clear()
        metrics["sync/engine_restarts"], self.restarts = float(self.restarts), 0
        return metrics | self._handover.take_metrics()

    async def to_trainer(self) -> None:
        """Give shared GPUs to the trainer. No request may be running."""
        async with self._care, self.turn:
            await self._handed(self._handover.to_trainer)

    async def _handed(self, step: Callable[[], Awaitable[None]]) -> None:
        """Run a step of the hand-over; if an engine gets stuck, restart it and repeat the step."""
        while True:
            try:
                return await step()
            except EngineStuck as error:
                await self._restart([error.engine], error.engine, error)

    async def recover(self, engine: int, error: EngineError) -> None:
        """Restore a failed engine with current weights, restarted unless only a connection broke. Raises as `sync`."""
        async with self._care:
            broke = isinstance(error, (EngineUnreachable, EngineTimeout))
            if broke and self._synced and await self._answers(engine):
                return
            await self._restart([engine], engine, error)
            async with self.turn:
                await self._load([engine])

    async def watch(self, report: Callable[[int, EngineError], None]) -> None:
        """Report engines whose processes have ended, until cancelled."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            if self._care.locked() or self._handover.trainer_has_them:
                continue  # `sync` looks at them next
            for engine, how in await self._servers.exited():
                report(engine, EngineUnreachable(f"engine {engine} {how}"))

    async def _load(self, checked: Sequence[int]) -> dict[str, float]:
        """Sync, compare these engines with the trainer, and give the GPUs to the engines."""
        while True:
            try:
                await self._handover.weights_come_back()
                metrics = await self._run_sync()
                await self._handover.room_for_answers()
                metrics |= await self._check(checked)
                await self._handover.to_engines()
            except SyncFailed as error:
                if error.engine is None:
                    raise
                # The other engines may hold a mixture of two versions, so restart them all.
                everyone = range(len(self._clients))
                await self._restart(everyone, error.engine, error)
                checked = everyone
            except EngineStuck as error:
                await self._restart([error.engine], error.engine, error)
            except EngineDistrusted as error:
                if not self._synced:
                    raise  # this first sync set all weights, so a restart would compute the same again
                await self._restart([error.engine], error.engine, error)
            except EngineError as error:
                # An engine took the weights and then did not answer.
                failed = await self._failing(checked)
                await self._restart(failed, failed[0], error)
            else:
                self._synced = True
                return metrics

    async def _run_sync(self) -> dict[str, float]:
        limit = self._deadlines.sync
        try:
            return await asyncio.wait_for(self._sync.run(self.version), limit)
        except TimeoutError:
            raise DeadlineExceeded(f"weight sync of version {self.version} did not end within {limit:.0f} s") from None

    async def _check(self, checked: Sequence[int]) -> dict[str, float]:
        async def log_probs(sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
            return (await self._trainer(self._deadlines.log_probs, WorkerMethods.log_probs, sequences))[0]

        engines = [self._plan.engines[engine] for engine in checked]
        found = await differences(
            [self._clients[engine] for engine in checked],
            engines,
            self._prompts,
            probe_settings(self._plan),
            log_probs,
            deadline_s=self._deadlines.probe,
            version=self.version,
        )
        check_trust(self._plan, engines, found, self.version)
        return {"sync/train_rollout_logprob_abs_diff": max(found)}

    async def _answers(self, engine: int) -> bool:
        """True if every rank of the engine answers a real request with the current weights."""
        client, ranks = self._clients[engine], self._plan.engines[engine].data_parallel_size
        settings = probe_settings(self._plan)
        try:
            answers = [
                await client.generate(
                    self._prompts[0],
                    settings,
                    deadline_s=self._deadlines.probe,
                    data_parallel_rank=rank if ranks > 1 else None,
                )
                for rank in range(ranks)
            ]
        except EngineError:
            return False
        return all(set(answer.weight_versions) == {self.version} for answer in answers)

    async def _failing(self, engines: Sequence[int]) -> list[int]:
        """Engines that do not answer; all of them if every one does now, since one of them did not before."""
        answers = await asyncio.gather(*(self._answers(engine) for engine in engines))
        return [engine for engine, good in zip(engines, answers, strict=True) if not good] or list(engines)

    async def _restart(self, engines: Sequence[int], blamed: int, error: VimeError) -> None:
        """Restart these engines. A failed start counts as another failure of the blamed one."""
        limit = self._plan.recipe.engine.max_engine_restarts
        names = ", ".join(map(str, engines))
        while True:
            self._restarts[blamed] += 1
            count = self._restarts[blamed]
            if count > limit:
                raise EngineLost(
                    f"engine {blamed} failed {count} times within one rollout, and --max-engine-restarts is {limit}: "
                    f"{error}; its log is {self._plan.run_dir}/logs/engines/engine-{blamed}-*.log",
                    cause_of(error),
                ) from error
            self._say(f"engine {blamed} failed ({error}): restarting engine {names}, {count} of {limit} times")
            try:
                await self._handover.room_to_start()
                await self._servers.restart(engines, deadline_s=self._deadlines.engine_start)
            except VimeError as failure:
                error = failure
            else:
                break
        self.restarts += len(engines)
        for engine in engines:
            self._handover.started(engine)
            self._sync.restarted(engine, self._clients[engine])
