"""A dispatcher with written answers, for what a session does with them: no engine shows each of these at will."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from vime.rollout.chat import ChatTemplate
from vime.rollout.client import Generated, SamplingSettings
from vime.rollout.dispatch import RoundFull, Seat
from vime.rollout.session import Budget, Session, Settings
from vime.samples import Sample

Answer = tuple[Sequence[int], str]
"""Token ids, and why they end: `stop`, `length`, `abort`; or `closed` for a round that takes no request any more."""


class ScriptedDispatcher:
    """Answers each request with the next of `answers`, cut at its limit; remembers what was asked."""

    def __init__(self, answers: Sequence[Answer], *, seconds: float = 0.0, version: int = 3) -> None:
        self.answers, self.seconds, self.version = list(answers), seconds, version
        self.asked: list[dict[str, Any]] = []
        self.parsed: Callable[[Sequence[int]], dict[str, Any]] = lambda ids: {"role": "assistant", "content": str(ids)}

    async def generate(
        self, seat: Seat, token_ids: Sequence[int], settings: SamplingSettings, *, max_tokens: int, **more: Any
    ) -> Generated:
        self.asked.append({"token_ids": list(token_ids), "max_tokens": max_tokens, "settings": settings, **more})
        await asyncio.sleep(self.seconds)
        ids, finish = self.answers.pop(0)
        if finish == "closed":
            raise RoundFull
        if len(ids) > max_tokens:
            ids, finish = ids[:max_tokens], "length"
        number = len(self.asked)
        return Generated(list(ids), [-0.1 * number] * len(ids), [self.version] * len(ids), finish)

    async def parse(self, seat: Seat, token_ids: Sequence[int], tools: Sequence[Any]) -> dict[str, Any]:
        return self.parsed(token_ids)

    @contextlib.asynccontextmanager
    async def clock(self, seconds: float):
        async with asyncio.timeout(seconds):
            yield


def settings_of(dispatcher: Any, tokenizer: Any, *, most: int = 4096, context: int = 8192, **budget: Any) -> Settings:
    """Settings of a conversation with up to 64 turns unless `budget` says otherwise."""
    divergence = budget.pop("divergence", "count")
    return Settings(
        dispatcher,
        ChatTemplate(tokenizer),
        SamplingSettings(max_tokens=most),
        context,
        60.0,
        Budget(**{"turns": 64, **budget}),
        divergence=divergence,
    )


def session_of(settings: Settings, sample: Sample | None = None) -> Session:
    """A session of a sample, or of a new one that asks `go`."""
    messages = [{"role": "user", "content": "go"}]
    return Session(sample or Sample(7, 1, messages, settings.template.prompt(messages)), Seat(1), settings)
