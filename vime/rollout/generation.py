"""Generation, decoding and scoring of a group, sample by sample."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from vime.rewards.scorer import Scorer
from vime.rollout.client import SamplingSettings
from vime.rollout.dispatch import Dispatcher, RoundFull, Seat
from vime.samples import Group, Sample, Status

_LONG = 512
"""Longer responses are decoded in a thread, off the event loop."""


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
    """Engines, tokenizer and rewards, as training and evaluation share them."""

    dispatcher: Dispatcher
    scorer: Scorer
    tokenizer: Any
    context_length: int
    """Tokens of prompt and response together that the engines take."""
    seed: int | None = None
    """Base seed, combined with the sample index; None: unseeded."""
    mask_old_tokens: bool = False
    """Leave the tokens that an aborted sample brings from an earlier rollout out of the loss."""
    tokens: int = field(default=0, init=False)
    """Tokens generated so far."""

    async def finish(self, group: Group, settings: SamplingSettings, deadline_s: float) -> bool:
        """Generate the group's missing responses and score them; False if the round was stopped first."""
        missing = [sample for sample in group.samples if sample.status in (Status.PENDING, Status.ABORTED)]
        try:
            seat = await self.dispatcher.take_seat(len(missing)) if missing else None
        except RoundFull:
            return False
        try:
            await all_of(self._finish_sample(sample, seat, settings, deadline_s) for sample in group.samples)
        finally:
            if seat is not None:
                self.dispatcher.leave(seat)
        if self.dispatcher.stopping or not all(is_generated(sample) for sample in group.samples):
            return False
        if self.scorer.of_groups:
            await self.scorer.score(group)
        return True

    async def _finish_sample(
        self, sample: Sample, seat: Seat | None, settings: SamplingSettings, deadline_s: float
    ) -> None:
        if not is_generated(sample):
            assert seat is not None
            try:
                await self._generate(sample, seat, settings, deadline_s)
            except RoundFull:
                return
        unscored = is_generated(sample) and sample.reward is None
        if unscored and not self.scorer.of_groups and not self.dispatcher.stopping:
            await self.scorer.score_sample(sample)

    async def _generate(self, sample: Sample, seat: Seat, settings: SamplingSettings, deadline_s: float) -> None:
        room = min(settings.max_tokens, self.context_length - len(sample.prompt_ids)) - len(sample.response_ids)
        if room <= 0:
            sample.status = Status.TRUNCATED
            return
        generated = await self.dispatcher.generate(
            seat,
            sample.prompt_ids + sample.response_ids,
            settings,
            max_tokens=room,
            deadline_s=deadline_s,
            seed=None if self.seed is None else request_seed(self.seed, sample),
        )
        if self.mask_old_tokens:
            sample.loss_mask = [0] * len(sample.response_ids)
        generated.append_to(sample)
        self.tokens += len(generated.token_ids)
        sample.response = await self._text(sample.response_ids)

    async def _text(self, token_ids: list[int]) -> str:
        if len(token_ids) < _LONG:
            return self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return await asyncio.to_thread(self.tokenizer.decode, token_ids, skip_special_tokens=True)


def request_seed(seed: int, sample: Sample) -> int:
    """Seed (56 bits) of a sample's next tokens, the same whenever and wherever the request is sent."""
    text = f"{seed}/{sample.index}/{len(sample.response_ids)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


def is_generated(sample: Sample) -> bool:
    """True once the sample's response is complete or failed."""
    return sample.status in (Status.COMPLETED, Status.TRUNCATED, Status.FAILED)
