"""Metrics of a rollout, computed from its groups by pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from vime.samples import UNVERSIONED, Group, Sample, Status


def finished_metrics(finished: Sequence[Group]) -> dict[str, float]:
    """Metrics over all finished groups, before the filter, so that dropping groups cannot raise the reported reward."""
    samples = [sample for group in finished for sample in group.samples]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    equal = [group for group in finished if len({sample.reward for sample in group.samples}) == 1]
    metrics = {"rollout/num_finished_groups": float(len(finished))}
    if rewards:
        metrics["rollout/raw_reward"] = statistics.fmean(rewards)
    if finished:
        metrics["rollout/zero_std_share"] = len(equal) / len(finished)
        metrics["rollout/group_reward_std"] = statistics.fmean(_deviation(group) for group in finished)
    return metrics | length_metrics("rollout", samples)


def by_set_metrics(groups: Mapping[str, Sequence[Group]]) -> dict[str, float]:
    """The reward, its spread and the lengths of each prompt set's finished groups, `rollout/<set>/…`."""
    metrics: dict[str, float] = {}
    for name, finished in groups.items():
        of_set = finished_metrics(finished)
        shown = ("raw_reward", "zero_std_share", "num_finished_groups", "response_length", "truncated_share")
        metrics |= {f"rollout/{name}/{key}": of_set[f"rollout/{key}"] for key in shown if f"rollout/{key}" in of_set}
    return metrics


def length_metrics(prefix: str, samples: Sequence[Sample]) -> dict[str, float]:
    """Response and prompt lengths in tokens, and the share of responses cut at the limit."""
    if not samples:
        return {}
    lengths = sorted(len(sample.response_ids) for sample in samples)
    return {
        f"{prefix}/response_length": statistics.fmean(lengths),
        f"{prefix}/response_length_max": float(lengths[-1]),
        f"{prefix}/response_length_min": float(lengths[0]),
        f"{prefix}/response_length_median": float(statistics.median(lengths)),
        f"{prefix}/prompt_length": statistics.fmean(len(sample.prompt_ids) for sample in samples),
        f"{prefix}/truncated_share": statistics.fmean(sample.status == Status.TRUNCATED for sample in samples),
    }


def training_metrics(groups: Sequence[Group], current_version: int) -> dict[str, float]:
    """Over the groups that training gets; staleness is how many versions a token's weights are behind the trainer's
    when it trains on it."""
    samples = [sample for group in groups for sample in group.samples]
    versions = [version for sample in samples for version in sample.weight_versions if version != UNVERSIONED]
    behind = [current_version - version for version in versions]
    metrics = {
        "rollout/num_groups": float(len(groups)),
        "rollout/num_samples": float(len(samples)),
        "rollout/reward": statistics.fmean(s.reward for s in samples if s.reward is not None) if samples else 0.0,
        "rollout/tokens": float(sum(len(sample.response_ids) for sample in samples)),
    }
    if behind:
        metrics["rollout/staleness"] = sum(behind) / len(behind)
        metrics["rollout/staleness_max"] = float(max(behind))
    return metrics


def _deviation(group: Group) -> float:
    rewards = [sample.reward for sample in group.samples if sample.reward is not None]
    return statistics.pstdev(rewards) if rewards else 0.0
