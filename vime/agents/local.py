"""Conversations in the driver's own event loop, and what counts as a failed one wherever it runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from vime.agents.sandbox import Programs
from vime.agents.ways import Way
from vime.errors import DataError
from vime.rollout.session import ConversationOver, Session
from vime.samples import Sample, Status

log = logging.getLogger(__name__)

MOST_FAILURES = 0.1
"""Share of the conversations whose function or environment may fail before the run ends."""
_FEWEST_FOR_A_SHARE = 32


@dataclass
class Failures:
    """Conversations that failed by the fault of what holds them, among all."""

    held: int = 0
    failed: int = 0
    first: str = ""
    since: int = 0
    """Failures since the last `take`."""

    def add(self, sample: Sample, why: str) -> None:
        """Mark a sample as failed. Raises DataError once more than the allowed share has."""
        sample.status, sample.reward = Status.FAILED, None
        self.failed += 1
        self.since += 1
        self.first = self.first or f"sample {sample.index} of group {sample.group_index}: {why}"
        log.debug("sample %d of group %d: %s", sample.index, sample.group_index, why)
        if self.failed > MOST_FAILURES * max(self.held, _FEWEST_FOR_A_SHARE):
            counts = f"{self.failed} of {self.held} conversations failed, more than {MOST_FAILURES:.0%}"
            raise DataError(f"{counts}; first: {self.first}")

    def take(self) -> dict[str, float]:
        """The metric of the failures since the last call."""
        since, self.since = self.since, 0
        return {"rollout/agent_failures": float(since)}


@dataclass
class LocalAgent:
    """Holds conversations in this event loop, which a way that blocks would stop. An async context manager."""

    way: Way
    failures: Failures = field(default_factory=Failures)
    programs: Programs | None = None
    """Place of the programs of its tools; checked first."""

    async def __aenter__(self) -> Self:
        if self.programs is not None:
            await self.programs.check()
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def __call__(self, session: Session) -> None:
        self.failures.held += 1
        try:
            async with asyncio.timeout_at(session.ends_at) as limit:
                await self.way.hold(session)
        except ConversationOver:
            raise
        except Exception as error:  # noqa: BLE001 -- functions raise whatever they like; it is counted
            if session.over is not None:
                return  # the session holds why: the engines' fault or a limit, whatever the way made of it
            if isinstance(error, TimeoutError) and limit.expired():
                session.expire()
            self.failures.add(session.sample, f"{type(error).__name__}: {error}")
        else:
            if session.sample.status == Status.FAILED:
                self.failures.add(session.sample, "it was marked as failed")

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools that prompts tell of."""
        return self.way.tools

    def resumes(self, sample: Sample) -> bool:
        """Whether an aborted conversation can go on."""
        return self.way.goes_on or sample.environment is not None

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        return self.failures.take() | (self.programs.take_metrics() if self.programs else {})
