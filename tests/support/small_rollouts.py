"""Rollouts of a few samples with given rewards and lengths."""

from __future__ import annotations

from vime.megatron.microbatch import RolloutTokens
from vime.samples import Group, Rollout, Sample


def rollout_of(rewards: list[list[float]], lengths: list[int]) -> tuple[Rollout, RolloutTokens]:
    """A group for each list of rewards; sample n has `lengths[n % len(lengths)]` response tokens."""
    groups, number = [], 0
    for index, values in enumerate(rewards):
        samples = []
        for reward in values:
            response = list(range(lengths[number % len(lengths)]))
            samples.append(Sample(number, index, "", [1], response_ids=response, reward=reward))
            number += 1
        groups.append(Group(index, samples))
    rollout = Rollout(0, groups)
    return rollout, RolloutTokens.of([(s.prompt_ids, s.response_ids) for s in rollout.samples])
