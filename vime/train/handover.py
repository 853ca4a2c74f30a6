"""Hand-over of the GPUs: with `--colocate` trainer and engines take turns, which this module tracks.

    train ─► gradients leave ─► engines' weights wake ─► sync ─► engines' cache wakes ─► weights leave ─► generate
      ▲                                                                                                      │
      └──────────────────────────── weights and gradients come back ◄── engines sleep ◄─────────────────────┘

Every step has a deadline. Free bytes of every GPU and host are recorded before and after it, and host memory taken is
compared with the plan. CPU runs execute the same steps, though little moves there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from vime.errors import Cause, VimeError
from vime.run.plan import Plan
from vime.sync.ranks import Free, Part, ResidenceMethods, TrainerCall

P = ParamSpec("P")
R = TypeVar("R")

PLANNED_AS = {
    "gradients_leave": ("optimizer_backup",),
    "weights_leave": ("weights_backup", "backup_rounding"),
    "engines_sleep": ("engine_sleep_copy",),
}
"""Items of the plan's host memory that each step may fill."""
SLEEP_LEVEL = 2
"""vLLM's level that drops the weights, since every sync brings them all; buffers, which no sync brings, are kept."""
SLACK_BYTES = 2 * 2**30
"""Bytes of host memory that other processes may take or free during a step."""


class Sleeper(Protocol):
    """Calls to an engine (`vime.rollout.client.EngineClient`)."""

    async def sleep(self, level: int) -> None: ...
    async def wake_up(self, tags: Sequence[str] = ()) -> None: ...


class EngineStuck(VimeError):
    """An engine failed to sleep or to wake."""

    def __init__(self, text: str, engine: int, cause: Cause) -> None:
        super().__init__(text)
        self.engine, self.cause = engine, cause


@dataclass(frozen=True)
class HandoverDeadlines:
    """Seconds after which a step has failed."""

    trainer: float = 300.0
    engines: float = 300.0


class Handover:
    """Owner of a run's GPUs. Its methods do nothing if trainer and engines have separate GPUs."""

    def __init__(
        self,
        plan: Plan,
        trainer: TrainerCall,
        engines: Sequence[Sleeper],
        deadlines: HandoverDeadlines | None = None,
        *,
        asleep: bool = False,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self._plan, self._trainer, self._engines = plan, trainer, list(engines)
        self._deadlines, self._say = deadlines or HandoverDeadlines(), say
        self.takes_turns = plan.recipe.resources.colocate
        self._asleep = {engine: {"weights", "kv_cache"} for engine in range(len(engines))} if asleep else {}
        """Sleeping parts of each engine, as vLLM's tags; an engine without any is left out."""
        self._away: set[Part] = set()
        """Parts of the trainer that are off the GPUs."""
        self._metrics: dict[str, float] = {}

    @property
    def trainer_has_them(self) -> bool:
        """True while engines sleep: they can then neither serve requests nor be started."""
        return bool(self._asleep)

    async def engines_sleep(self) -> None:
        """Free the engines' GPU memory; the next sync brings their weights again."""
        if self.takes_turns and not self._asleep:
            everyone = range(len(self._engines))
            await self._step("engines_sleep", lambda: self._each(everyone, lambda engine: engine.sleep(SLEEP_LEVEL)))
            self._asleep = {engine: {"weights", "kv_cache"} for engine in everyone}

    async def to_trainer(self) -> None:
        """Bring the trainer back whole, ready to train and save; engines sleep first."""
        await self.engines_sleep()
        await self.weights_come_back()
        await self._come_back("gradients")

    async def room_for_weights(self) -> None:
        """Make room for the engines' weights: the trainer keeps its weights and drops its gradients."""
        await self.weights_come_back()
        await self._leave("gradients")
        await self._wake("weights")

    async def room_for_answers(self) -> None:
        """Wake the engines' cache, so that they answer; the trainer keeps its weights, to compare log-probs."""
        await self._wake("kv_cache")

    async def to_engines(self) -> None:
        """Move the rest of the trainer off the GPUs."""
        await self._leave("weights")

    async def weights_come_back(self) -> None:
        """Bring the trainer's weights back, in any state of the engines."""
        await self._come_back("weights")

    async def room_to_start(self) -> None:
        """Move the trainer off the GPUs entirely: a starting engine takes its whole share at once, and fails if less is
        free. `weights_come_back` brings the trainer back for the sync that follows."""
        await self._leave("gradients")
        await self._leave("weights")

    def started(self, engine: int) -> None:
        """Record that an engine was restarted, and so is awake."""
        self._asleep.pop(engine, None)

    def take_metrics(self) -> dict[str, float]:
        """Metrics `handover/…` of the steps since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    async def _wake(self, tag: str) -> None:
        waiting = [engine for engine, asleep in self._asleep.items() if tag in asleep]
        if not waiting:
            return
        await self._step(f"engines_wake_{tag}", lambda: self._each(waiting, lambda engine: engine.wake_up([tag])))
        for engine in waiting:
            self._asleep[engine].discard(tag)
        self._asleep = {engine: asleep for engine, asleep in self._asleep.items() if asleep}

    async def _leave(self, part: Part) -> None:
        if self.takes_turns and part not in self._away:
            await self._step(f"{part}_leave", lambda: self._call(ResidenceMethods.leave, part))
            self._away.add(part)

    async def _come_back(self, part: Part) -> None:
        if part in self._away:
            await self._step(f"{part}_come_back", lambda: self._call(ResidenceMethods.come_back, part))
            self._away.discard(part)

    async def _call(self, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs) -> list[R]:
        return await self._trainer(self._deadlines.trainer, method, *args, **kwargs)

    async def _each(self, engines: Iterable[int], call: Callable[[Sleeper], Awaitable[None]]) -> None:
        async def one(engine: int) -> None:
            limit = self._deadlines.engines
            try:
                await asyncio.wait_for(call(self._engines[engine]), limit)
            except TimeoutError:
                text = f"engine {engine} did not sleep or wake within {limit:.0f} s"
                raise EngineStuck(text, engine, Cause.DEADLINE) from None
            except VimeError as error:
                raise EngineStuck(f"engine {engine} did not sleep or wake: {error}", engine, error.cause) from error

        await asyncio.gather(*(one(engine) for engine in engines))

    async def _step(self, name: str, work: Callable[[], Awaitable[Any]]) -> None:
        before = await self._call(ResidenceMethods.free_bytes)
        started = time.monotonic()
        try:
            await work()
        except VimeError as error:
            error.add_note(f"in the hand-over of GPUs, step {name}; free before it: {described(before)}")
            raise
        self._metrics[f"handover/{name}_time"] = time.monotonic() - started
        after = await self._call(ResidenceMethods.free_bytes)
        self._metrics |= {f"handover/{name}_{key}": value for key, value in moved(before, after).items()}
        over = over_plan(self._plan, name, before, after)
        for node, (taken, planned) in over.items():
            self._say(
                f"handover {name}: node {node} took {taken / 1e9:.1f} GB of host memory, planned {planned / 1e9:.1f} GB"
            )
        worst = max((taken - planned for taken, planned in over.values()), default=0)
        self._metrics["handover/host_over_plan_bytes"] = max(
            float(worst), self._metrics.get("handover/host_over_plan_bytes", 0.0)
        )


def host_taken(before: Sequence[Free], after: Sequence[Free]) -> dict[int, int]:
    """Bytes of host memory taken on each node."""
    first, last = ({node: host for node, _, host in free} for free in (before, after))
    return {node: first[node] - last[node] for node in first}


def moved(before: Sequence[Free], after: Sequence[Free]) -> dict[str, float]:
    """Worst case over ranks: GPU bytes freed and now free, host bytes taken and left."""
    values = {
        "host_taken_bytes": float(max(host_taken(before, after).values())),
        "host_free_bytes": float(min(host for _, _, host in after)),
    }
    freed = [now - then for (_, then, _), (_, now, _) in zip(before, after, strict=True) if now is not None and then]
    if freed:
        values["gpu_freed_bytes"] = float(min(freed))
        values["gpu_free_bytes"] = float(min(gpu for _, gpu, _ in after if gpu is not None))
    return values


def over_plan(plan: Plan, step: str, before: Sequence[Free], after: Sequence[Free]) -> Mapping[int, tuple[int, int]]:
    """(taken, planned) host bytes of each node on which a step took more than planned."""
    items = PLANNED_AS.get(step, ())
    found = {}
    for node, taken in host_taken(before, after).items():
        planned = sum(each.bytes for each in plan.nodes[node].host_memory.items if each.name in items)
        if taken > planned + SLACK_BYTES:
            found[node] = (taken, planned)
    return found


def described(free: Sequence[Free]) -> str:
    """Smallest free GPU and host memory, for messages."""
    gpus = [gpu for _, gpu, _ in free if gpu is not None]
    gpu = f"{min(gpus) / 1e9:.1f} GB of a GPU, " if gpus else ""
    return f"{gpu}{min(host for _, _, host in free) / 1e9:.1f} GB of a host"
