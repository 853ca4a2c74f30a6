"""vLLM's own counters as rates per rollout: prefix-cache hits and accepted draft tokens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from vime.rollout.client import EngineError

_COUNTERS = {
    "queries": "vllm:prefix_cache_queries",
    "hits": "vllm:prefix_cache_hits",
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}
_RATES = (("perf/engine_cache_hit_rate", "hits", "queries"), ("perf/draft_acceptance_rate", "accepted", "drafted"))


class Measured(Protocol):
    """The part of EngineClient that is used here."""

    async def metrics(self) -> str: ...


class EngineCounters:
    """The counters of all engines, and the rates since they were last asked for."""

    def __init__(self, clients: Sequence[Measured]) -> None:
        self._clients = list(clients)
        self._before: list[dict[str, float]] = [{} for _ in clients]

    async def take_rates(self) -> dict[str, float]:
        """`perf/engine_cache_hit_rate` and `perf/draft_acceptance_rate` over all engines since the last call.

        A counter that no engine has (drafts without speculation) gives no rate. An engine that does not answer is left
        out: its health is checked elsewhere.
        """
        pages = await asyncio.gather(*(client.metrics() for client in self._clients), return_exceptions=True)
        grown: dict[str, float] = {}
        for number, page in enumerate(pages):
            if isinstance(page, EngineError):
                continue
            if isinstance(page, BaseException):
                raise page
            after = parse(page)
            for name, value in increase(self._before[number], after).items():
                grown[name] = grown.get(name, 0.0) + value
            self._before[number] = after
        return {rate: grown[part] / grown[whole] for rate, part, whole in _RATES if grown.get(whole) and part in grown}


def parse(page: str) -> dict[str, float]:
    """Counters of a Prometheus page, summed over labels; absent ones are left out."""
    found: dict[str, float] = {}
    for name, metric in _COUNTERS.items():
        lines = re.findall(rf"^{re.escape(metric)}(?:_total)?(?:\{{[^}}]*\}})? (\S+)$", page, flags=re.MULTILINE)
        if lines:
            found[name] = sum(map(float, lines))
    return found


def increase(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Growth of each counter; one that shrank belongs to a restarted engine and began at 0."""
    return {name: now - before.get(name, 0.0) if now >= before.get(name, 0.0) else now for name, now in after.items()}
