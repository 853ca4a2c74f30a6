"""Driver side of a weight sync, with a fake trainer and fake engines that record calls and fail on request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from tests.support import patience
from tests.support.tiny_hf import DEEPSEEK, with_fp8
from vime.errors import DeadlineExceeded
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Where
from vime.recipe.parallel import ParallelLayout
from vime.rollout.client import EngineStatus
from vime.run.plan import EnginePlan
from vime.sync.ranks import address
from vime.sync.receivers import receivers_of
from vime.sync.schedule import make_schedule
from vime.sync.session import Session, SyncDeadlines

CONFIG = ModelConfig.from_hf(with_fp8(DEEPSEEK))
NAMES = [part.name for param in params_of(CONFIG) if param.where != Where.MTP for part in param.parts]
WORKER = "dp0:pp0:pcp0:tp0:"
RECEIVED = {f"{WORKER}received.{name}": "x" for name in NAMES}


class FakeTrainer:
    """Answers as ranks that publish for one receiver each; keeps the order of calls with those of the engines."""

    def __init__(self, journal: list[tuple[str, Any]], buckets: int, receivers: int) -> None:
        self.journal, self.buckets, self.receivers = journal, buckets, receivers
        self.late: str | None = None
        self.digests = dict.fromkeys(NAMES, "x")

    async def __call__(self, deadline_s: float, function: Callable[..., Any], *args: Any) -> list[Any]:
        method = "_".join(address(function))
        self.journal.append((method, args[0] if args else None))
        if method == self.late:
            raise DeadlineExceeded(f"trainer {method} did not end within {deadline_s:.0f} s")
        await asyncio.sleep(0)
        if method == "weights_prepare":
            return [self.buckets] * 2
        if method == "weights_publish":
            return [{str(number): {"size": 10, "bucket": args[0]}} for number in range(self.receivers)]
        if method == "weights_digests":
            return [self.digests, {}]
        return [None, None]


class FakeEngine:
    """Records every call; `fails_at` is a (method, bucket) at which it answers 500, or never answers."""

    def __init__(self, journal: list[tuple[str, Any]], number: int) -> None:
        self.journal, self.number = journal, number
        self.fails_at: tuple[str, int | None] | None = None
        self.hangs = False
        self.sums: list[dict[str, str]] = []
        """Answers to `checksums`, in turn."""

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            bucket = args[0].get("bucket") if args and isinstance(args[0], dict) else None
            value = bucket if method == "update_weights" else args[0] if args else None
            self.journal.append((f"{self.number}:{method}", value))
            await asyncio.sleep(0.001)
            if self.fails_at == (method, bucket):
                if self.hangs:
                    await asyncio.sleep(3600)
                raise EngineStatus(f"POST /{method} answered 500", 500)
            return self.sums.pop(0) if method == "checksums" else None

        return call


def session(
    engines: Sequence[EnginePlan], *, draft: bool = False, deadline: float = patience.MOMENT
) -> tuple[Session, FakeTrainer, list[FakeEngine], list[tuple[str, Any]]]:
    journal: list[tuple[str, Any]] = []
    receivers = receivers_of(CONFIG, [0, 1], engines)
    schedule = make_schedule(CONFIG, ParallelLayout(2), [0, 1], receivers, 100_000, draft=draft)
    trainer = FakeTrainer(journal, len(schedule.buckets), len(receivers))
    fakes = [FakeEngine(journal, number) for number in range(len(engines))]
    deadlines = SyncDeadlines(engine=deadline)
    clients: list[Any] = list(fakes)
    return Session(schedule, engines, trainer, clients, "keep", deadlines), trainer, fakes, journal
