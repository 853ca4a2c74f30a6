"""From a rollout's rewards to the loss mask of every sample and the advantage of every response token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vime.errors import DataError
from vime.megatron import losses
from vime.megatron.microbatch import RolloutTokens
from vime.recipe.schema import AlgorithmOptions
from vime.samples import Rollout, Sample


def loss_mask(sample: Sample) -> torch.Tensor:
    """fp32 [response tokens]; every token is trained on where the sample has no mask. Raises DataError for another
    length."""
    if not sample.loss_mask:
        return torch.ones(len(sample.response_ids))
    if len(sample.loss_mask) != len(sample.response_ids):
        raise DataError(
            f"sample {sample.index} has {len(sample.response_ids)} response tokens, {len(sample.loss_mask)} in its mask"
        )
    return torch.tensor(sample.loss_mask, dtype=torch.float32)


def advantage_column(
    rollout: Rollout, data: RolloutTokens, columns: Mapping[str, torch.Tensor], algorithm: AlgorithmOptions
) -> torch.Tensor:
    """The advantage of every response token, fp32 [slots]: its sample's, by the recipe's estimator.

    With `kl_coef` the reward is first lessened by the KL between the columns `old` and `reference`, summed over the
    sample's trained tokens. Raises DataError for a reward that is missing or not finite.
    """
    groups, number = [], 0
    for group in rollout.groups:
        rewards = torch.tensor([_reward(sample) for sample in group.samples], dtype=torch.float32)
        if algorithm.kl_coef:
            divergence = losses.kl_divergence(columns["old"], columns["reference"], algorithm.kl_loss_type)
            sums = [
                float(losses.weighted_sum(divergence[data.response(number + i)], loss_mask(sample)))
                for i, sample in enumerate(group.samples)
            ]
            rewards = losses.rewards_less_kl(rewards, torch.tensor(sums), algorithm.kl_coef)
        groups.append(rewards)
        number += len(group.samples)
    values = losses.batch_advantages(groups, algorithm.advantage_estimator, normalise=algorithm.normalize_advantages)
    column = torch.zeros(data.slots)
    for sample, value in enumerate(torch.cat(values).tolist()):
        column[data.response(sample)] = value
    return column


def _reward(sample: Sample) -> float:
    if sample.reward is None or not math.isfinite(sample.reward):
        raise DataError(
            f"sample {sample.index} of group {sample.group_index} has the reward {sample.reward}, not a finite number: "
            "look at what --rm-type gives for it"
        )
    return sample.reward
