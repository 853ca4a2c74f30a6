"""Rewards from a server: one JSON request per sample; a server that is away is waited for."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from typing import Any, Self

import aiohttp

from vime.errors import Crash
from vime.rewards.pool import CallFailed, CallTimeout
from vime.samples import Sample

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
TIMEOUTS = 3
"""Requests for one sample without an answer, from a server that answers others, before that sample has failed."""
_MOST_CONNECTIONS = 256


class RewardServerAway(Crash):
    """The reward server was away for longer than it is waited for; the run can start again once it is back."""


class _NoAnswer(Exception):
    """A request that another try can succeed with."""


class RemoteReward:
    """POSTs `{"prompt", "response", "label", "metadata"}` to a server that answers a number or `{"reward": number}`."""

    def __init__(self, url: str, *, patience_s: float) -> None:
        self._url, self._patience_s = url, patience_s
        self._session: aiohttp.ClientSession | None = None
        self._away_since: float | None = None
        self._answered_at = time.monotonic()

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_MOST_CONNECTIONS))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, sample: Sample, limit_s: float) -> float:
        """The sample's reward; `limit_s` seconds for each request.

        Raises CallFailed for an answer that is none, CallTimeout where only this sample gets no answer, and
        RewardServerAway once no sample got one for the time that the server is waited for.
        """
        pause, timeouts = FIRST_PAUSE_SECONDS, 0
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(limit_s):
                    number = await self._ask(sample)
            except TimeoutError:
                problem, timeouts = f"no answer within {limit_s:g} s", timeouts + 1
                if timeouts >= TIMEOUTS and self._answered_at > began:
                    raise CallTimeout(f"reward server {self._url}: {problem}, {timeouts} times") from None
            except _NoAnswer as error:
                problem = str(error)
            else:
                return number
            self._is_away(began, problem)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _is_away(self, began: float, problem: str) -> None:
        """Count the time without any answer; says once that the server is away, and raises at the end of patience."""
        if self._answered_at > began:
            return
        if self._away_since is None:
            self._away_since = began
            log.warning("reward server %s is away (%s): groups wait for it", self._url, problem)
        if time.monotonic() - self._away_since > self._patience_s:
            raise RewardServerAway(
                f"reward server {self._url} was away for {self._patience_s:g} s (--rm-patience): {problem}"
            )

    def _is_here(self) -> None:
        self._answered_at = time.monotonic()
        if self._away_since is not None:
            log.warning("reward server %s is back after %.0f s", self._url, self._answered_at - self._away_since)
            self._away_since = None

    async def _ask(self, sample: Sample) -> float:
        assert self._session is not None
        body = {key: getattr(sample, key) for key in ("prompt", "response", "label", "metadata")}
        try:
            async with self._session.post(self._url, json=body) as answer:
                text = await answer.text()
        except aiohttp.ClientError as error:
            raise _NoAnswer(f"{type(error).__name__}: {error}") from error
        if answer.status >= 500 or answer.status in (408, 429):
            raise _NoAnswer(f"status {answer.status}: {text[:200]}")
        self._is_here()
        if answer.status != 200:
            raise CallFailed(f"reward server {self._url}: status {answer.status}: {text[:200]}")
        return self._read(text)

    def _read(self, text: str) -> float:
        try:
            value: Any = json.loads(text)
            if isinstance(value, dict):
                value = value["reward"] if "reward" in value else value["score"]
            number = float(value)
        except (ValueError, TypeError, KeyError) as error:
            raise CallFailed(f"reward server {self._url} answered {text[:200]!r} instead of a number") from error
        if not math.isfinite(number):
            raise CallFailed(f"reward server {self._url} answered {number}")
        return number
