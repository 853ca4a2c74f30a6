"""Real engines that receive weights from a trainer of the tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.support.engines import log_probs
from tests.support.fresh_engine import PROMPTS
from tests.support.trainer import Held, Trainer
from vime.rollout.client import EngineClient
from vime.sync.session import Session, SyncDeadlines

OLD, MIDDLE, NEW = 1, 2, 3
"""Seeds of weights."""
FAR_NODE = 7


class Synced:
    """Engines that a trainer gives its weights to."""

    def __init__(self, trainer: Trainer, held: Held, clients: list[EngineClient]) -> None:
        self.trainer, self.held, self.clients = trainer, held, clients
        self.version = 0

    async def sync(self, *, check: bool = False, **changes: Any) -> dict[str, float]:
        """A sync from a trainer that holds something else than the one before it."""
        self.held = replace(self.held, **changes)
        schedule = await self.trainer.hold(self.held)
        addresses = ["127.0.0.1"] * (FAR_NODE + 1)
        session = Session(schedule, self.held.engines, self.trainer, self.clients, "keep", SyncDeadlines(), addresses)
        self.version += 1
        return await session.run(self.version, check=check)

    async def checksums(self) -> list[dict[str, str]]:
        return [await client.checksums() for client in self.clients]

    async def answers(self, replica: int | None = None) -> list[list[tuple[list[int], list[float]]]]:
        return [[await log_probs(client, prompt, replica=replica) for prompt in PROMPTS] for client in self.clients]

    async def forget(self) -> None:
        """Nothing of a sync is left that the next one could rest on."""
        for client in self.clients:
            await client.reset_weights()
