"""Conversations of a group and their scoring, sample by sample."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from vime.rewards.scorer import Scorer
from vime.rollout.client import SamplingSettings
from vime.rollout.dispatch import Dispatcher, RoundFull, Seat
from vime.rollout.routes import RouteBook
from vime.rollout.session import Aborted, Agent, BudgetSpent, ConversationOver, Counts, Session, Settings, SingleTurn
from vime.samples import Group, Sample, Status


async def all_of(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first failure cancels the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for each in work:
                tasks.create_task(each)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


@dataclass
class Generator:
    """Engines, agent and rewards, as training and evaluation share them."""

    scorer: Scorer
    settings: Settings
    """Settings shared by all conversations; the sampling and the deadline are the caller's."""
    agent: Agent = field(default_factory=SingleTurn)
    mask_old_tokens: bool = False
    """Leave the tokens that an aborted sample brings from an earlier rollout out of the loss."""
    tokens: int = field(default=0, init=False)
    """Tokens generated so far."""
    dropped: int = field(default=0, init=False)
    """Aborted conversations that could not go on and began again."""

    @property
    def dispatcher(self) -> Dispatcher:
        return self.settings.dispatcher

    def take_counts(self) -> tuple[Counts, int]:
        """Counts of all conversations, and how many began again, since the last call."""
        dropped, self.dropped = self.dropped, 0
        return self.settings.counts.take(), dropped

    async def finish(
        self, group: Group, sampling: SamplingSettings, deadline_s: float, routes: RouteBook | None = None
    ) -> bool:
        """Generate the group's missing responses and score them; False if the round was stopped first.

        `routes` takes the routes of the responses.
        """
        settings = replace(self.settings, sampling=sampling, deadline_s=deadline_s, routes=routes)
        missing = [sample for sample in group.samples if sample.status in (Status.PENDING, Status.ABORTED)]
        try:
            seat = await self.dispatcher.take_seat(len(missing)) if missing else None
        except RoundFull:
            return False
        try:
            await all_of(self._finish_sample(sample, seat, settings) for sample in group.samples)
        finally:
            if seat is not None:
                self.dispatcher.leave(seat)
        if self.dispatcher.stopping or not all(is_generated(sample) for sample in group.samples):
            return False
        if self.scorer.of_groups and all(sample.status != Status.FAILED for sample in group.samples):
            await self.scorer.score(group)
        return True

    async def _finish_sample(self, sample: Sample, seat: Seat | None, settings: Settings) -> None:
        if not is_generated(sample):
            assert seat is not None
            await self._generate(sample, seat, settings)
        unscored = sample.status in (Status.COMPLETED, Status.TRUNCATED) and sample.reward is None
        if unscored and not self.scorer.of_groups and not self.dispatcher.stopping:
            await self.scorer.score_sample(sample)

    async def _generate(self, sample: Sample, seat: Seat, settings: Settings) -> None:
        # A resumed run has the tokens of an aborted response without their routes.
        covered = settings.routes is None or settings.routes.covers(sample)
        if sample.response_ids and not (covered and self.agent.resumes(sample)):
            sample.restart()
            if settings.routes is not None:
                settings.routes.forget(sample)
            self.dropped += 1
        if self.mask_old_tokens:
            sample.loss_mask = [0] * len(sample.response_ids)
        session = Session(sample, seat, settings)
        try:
            await self.agent(session)
        except ConversationOver:
            pass  # the session holds why
        finally:
            self.tokens += session.tokens + sum(branch.tokens for branch in session.branches)
            self.dispatcher.free(seat)
        if isinstance(session.over, Aborted):
            return
        if session.over is not None and not isinstance(session.over, BudgetSpent):
            raise session.over
        session.finish()
        sample.branches = [branch.sample for branch in session.branches if branch.turns]


def is_generated(sample: Sample) -> bool:
    """True once the sample's response is complete or failed."""
    return sample.status in (Status.COMPLETED, Status.TRUNCATED, Status.FAILED)
