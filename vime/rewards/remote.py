"""Rewards from a server: one JSON request a sample, repeated when the server is busy or away."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Self

import aiohttp

from vime.rewards.pool import CallFailed, CallTimeout
from vime.samples import Sample

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
_MOST_CONNECTIONS = 256


class RemoteReward:
    """POSTs `{"prompt", "response", "label", "metadata"}` to a server that answers a number or `{"reward": number}`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=_MOST_CONNECTIONS))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, sample: Sample, limit_s: float) -> float:
        """The sample's reward. Raises CallTimeout after `limit_s` seconds in all, CallFailed after the last attempt."""
        try:
            async with asyncio.timeout(limit_s):
                return await self._ask(sample)
        except TimeoutError:
            raise CallTimeout(f"reward server {self._url} did not answer within {limit_s:g} s") from None

    async def _ask(self, sample: Sample) -> float:
        body = {key: getattr(sample, key) for key in ("prompt", "response", "label", "metadata")}
        problem = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                assert self._session is not None
                async with self._session.post(self._url, json=body) as answer:
                    text = await answer.text()
            except aiohttp.ClientError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status == 200:
                return self._read(text)
            problem = f"status {answer.status}: {text[:200]}"
            if answer.status < 500 and answer.status not in (408, 429):
                break
        raise CallFailed(f"reward server {self._url}: {problem}")

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
