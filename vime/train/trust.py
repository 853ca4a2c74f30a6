"""Compares the engines' log-probs on real requests with the trainer's, before an engine is used."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from vime.errors import VimeError
from vime.rollout.client import Generated, SamplingSettings
from vime.run.plan import EnginePlan, Plan

PROBES = 8
"""Number of prompts that every data-parallel rank of every engine answers."""
PROBE_TOKENS = 16
SAME_NUMBERS = 0.1
"""Nats, if engine and trainer hold the same numbers and differ in types and kernels only; measured: 0.006 to 0.03."""
ROUNDED_NUMBERS = 0.5
"""Nats, once the trainer's weights are off the engine's block-fp8 grid; measured on a small model: up to 0.3."""

LogProbs = Callable[[list[tuple[list[int], list[int]]]], Awaitable[list[list[float]]]]
"""The trainer's log-probs, in nats, of (prompt, response) token ids."""


class ProbeClient(Protocol):
    async def generate(
        self,
        token_ids: Sequence[int],
        settings: SamplingSettings,
        *,
        deadline_s: float,
        data_parallel_rank: int | None = None,
    ) -> Generated: ...


class EngineDistrusted(VimeError):
    """An engine's log-probs differ too much from the trainer's."""

    def __init__(self, text: str, engine: int) -> None:
        super().__init__(text)
        self.engine = engine


def trusted_difference(plan: Plan, version: int) -> float:
    """Mean absolute difference of log-probs, in nats, below which an engine is trusted.

    `--max-logprob-difference` if given. Weights are the same numbers on both sides unless they were trained and then
    quantised for the engine.
    """
    given = plan.recipe.engine.max_logprob_difference
    if given is not None:
        return given
    quantised = "quantization_config" in plan.model_config_hf
    return ROUNDED_NUMBERS if quantised and version > 0 else SAME_NUMBERS


def probe_settings(plan: Plan) -> SamplingSettings:
    """Settings of a rollout without top-p and top-k, so that rare tokens are compared too."""
    options = plan.recipe.rollout
    return SamplingSettings(min(PROBE_TOKENS, options.rollout_max_response_len), options.rollout_temperature)


async def differences(
    clients: Sequence[ProbeClient],
    engines: Sequence[EnginePlan],
    prompts: Sequence[list[int]],
    settings: SamplingSettings,
    log_probs: LogProbs,
    *,
    deadline_s: float,
    version: int,
) -> list[float]:
    """Mean absolute difference, in nats, of each engine's worst data-parallel rank, in the order of `engines`.

    Raises EngineDistrusted if an answer comes from another weight version, EngineError without an answer.
    """
    replicas = [(number, rank) for number, plan in enumerate(engines) for rank in range(plan.data_parallel_size)]

    async def answers(engine: int, rank: int) -> list[Generated]:
        only = rank if engines[engine].data_parallel_size > 1 else None
        asked = (
            clients[engine].generate(prompt, settings, deadline_s=deadline_s, data_parallel_rank=only)
            for prompt in prompts
        )
        return await asyncio.gather(*asked)

    found = await asyncio.gather(*(answers(*replica) for replica in replicas))
    for (engine, _), answered in zip(replicas, found, strict=True):
        versions = {number for answer in answered for number in answer.weight_versions}
        if versions != {version}:
            index = engines[engine].index
            text = f"engine {index} answered with weights of version {sorted(versions)} after the sync of {version}"
            raise EngineDistrusted(text, index)
    wanted = await log_probs(
        [(prompt, answer.token_ids) for answered in found for prompt, answer in zip(prompts, answered, strict=True)]
    )
    worst = [0.0] * len(engines)
    for number, ((engine, _), answered) in enumerate(zip(replicas, found, strict=True)):
        trainers = wanted[number * len(prompts) : (number + 1) * len(prompts)]
        difference = mean_difference([answer.log_probs for answer in answered], trainers)
        worst[engine] = max(worst[engine], difference)
    return worst


def mean_difference(engines: Sequence[Sequence[float]], trainers: Sequence[Sequence[float]]) -> float:
    """Mean absolute difference over all tokens."""
    pairs = [pair for mine, theirs in zip(engines, trainers, strict=True) for pair in zip(mine, theirs, strict=True)]
    return statistics.fmean(abs(a - b) for a, b in pairs)


def check_trust(plan: Plan, engines: Sequence[EnginePlan], found: Sequence[float], version: int) -> None:
    """Raise EngineDistrusted for the first engine at or above the bound."""
    bound = trusted_difference(plan, version)
    for engine, difference in zip(engines, found, strict=True):
        if not difference < bound:
            text = (
                f"engine {engine.index} gives log-probs that differ from the trainer's by {difference:.3g} nat on "
                f"average after the sync of version {version}, trusted is less than {bound:g} "
                "(--max-logprob-difference): it computes something else, or holds other weights"
            )
            raise EngineDistrusted(text, engine.index)
