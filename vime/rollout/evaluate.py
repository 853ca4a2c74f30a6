"""Evaluation on held-out sets: mean reward and pass@k per set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from vime.errors import DataError
from vime.recipe.sampling import SamplingSettings
from vime.rollout.data import PromptSet
from vime.rollout.generation import Generator, all_of
from vime.rollout.measures import length_metrics
from vime.samples import Group, new_group


async def evaluate(
    generator: Generator, sets: Sequence[PromptSet], settings: SamplingSettings, samples: int, deadline_s: float
) -> dict[str, float]:
    """`eval/<name>` (mean reward), `eval/<name>/pass@k`, lengths and left-out rows of every set, all sets at once.

    Raises DataError when no sample of a set got a reward.
    """
    groups = {each.name: [new_group(i, p, samples) for i, p in enumerate(each.prompts)] for each in sets}

    async def finish(group: Group) -> None:
        await generator.finish(group, settings, deadline_s)

    await all_of(finish(group) for name in groups for group in groups[name])
    metrics: dict[str, float] = {}
    for each in sets:
        metrics |= set_metrics(f"eval/{each.name}", groups[each.name])
        metrics[f"eval/{each.name}/prompts_too_long"] = float(each.too_long)
    return metrics


def set_metrics(prefix: str, groups: Sequence[Group]) -> dict[str, float]:
    """Mean reward, pass@k where rewards say right or wrong, lengths."""
    rewards = [[s.reward for s in group.samples if s.reward is not None] for group in groups]
    flat = [reward for group in rewards for reward in group]
    if not flat:
        raise DataError(f"{prefix}: no sample received a reward")
    metrics = {prefix: statistics.fmean(flat)}
    if set(flat) <= {-1.0, 0.0, 1.0}:
        fewest = min(len(group) for group in rewards)
        k = 1
        while k <= fewest:
            estimates = [pass_at_k(len(group), sum(reward > 0 for reward in group), k) for group in rewards]
            metrics[f"{prefix}/pass@{k}"] = statistics.fmean(estimates)
            k *= 2
    return metrics | length_metrics(prefix, [sample for group in groups for sample in group.samples])


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that at least one of k of the n samples, drawn without replacement, is right: 1 - C(n-c, k)/C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
