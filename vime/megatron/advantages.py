"""From a rollout's rewards to the loss mask of every sample and the advantage of every response token."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from vime.errors import DataError
from vime.megatron import losses
from vime.megatron.estimators import DistilledTokens, ScoredSamples, overlong_penalty
from vime.megatron.microbatch import RolloutTokens
from vime.megatron.plugins import function_of
from vime.recipe.algorithms import ADVANTAGE_TERMS, estimator
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
    rollout: Rollout,
    data: RolloutTokens,
    columns: Mapping[str, torch.Tensor],
    algorithm: AlgorithmOptions,
    longest: int = 0,
) -> torch.Tensor:
    """The advantage of every response token, fp32 [response tokens], by the recipe's estimator and terms.

    With `kl_coef` the estimator also gets the KL between the columns `old` and `reference`; with `use_opd` the columns
    `old` and `teacher` add the term of on-policy distillation, after any whitening. `longest` is
    `--rollout-max-response-len`, where `overlong_buffer_len` ends. Raises DataError for a reward that is missing or
    not finite, and for a plug-in's answer of another shape.
    """
    chosen = estimator(algorithm.advantage_estimator)
    function = function_of(chosen.function, "--advantage-estimator")
    found = function(_scored(rollout, data, columns, algorithm, longest), algorithm)
    lengths = [sum(len(branch.response_ids) for branch in branches) for branches in _conversations(rollout)]
    if [tuple(values.shape) for values in found] != [(length,) for length in lengths]:
        shapes = [tuple(values.shape) for values in found][:3]
        raise DataError(
            f"--advantage-estimator {algorithm.advantage_estimator} gave tensors of the shapes {shapes} ...: it must "
            f"give one tensor a sample, with a value for each of its response tokens ({lengths[:3]} ...)"
        )
    if not found:
        return torch.zeros(0)
    advantages = torch.cat(list(found))
    if algorithm.use_opd:
        advantages = advantages + _distillation(rollout, columns, algorithm)
    return advantages.to(torch.float32)


def teacher_column(rollout: Rollout) -> torch.Tensor:
    """The teacher's log-probs of every response token, fp32 [response tokens]. Raises DataError for a sample whose
    tokens it did not score."""
    for sample in rollout.samples:
        if len(sample.teacher_log_probs) != len(sample.response_ids):
            raise DataError(
                f"sample {sample.index} has {len(sample.response_ids)} response tokens and "
                f"{len(sample.teacher_log_probs)} log-probs of the teacher, which --use-opd needs: generate the "
                "rollout with it"
            )
    return torch.tensor([value for sample in rollout.samples for value in sample.teacher_log_probs])


def _distillation(rollout: Rollout, columns: Mapping[str, torch.Tensor], algorithm: AlgorithmOptions) -> torch.Tensor:
    """The term of `--use-opd`, fp64 [response tokens]."""
    masks = torch.cat([loss_mask(sample) for sample in rollout.samples])
    function = function_of(ADVANTAGE_TERMS["use_opd"].function, "--use-opd")
    return function(DistilledTokens(columns["old"], columns["teacher"], masks), algorithm)


def _scored(
    rollout: Rollout,
    data: RolloutTokens,
    columns: Mapping[str, torch.Tensor],
    algorithm: AlgorithmOptions,
    longest: int,
) -> ScoredSamples:
    def shaped(branches: list[Sample]) -> float:
        reward, buffer = _reward(branches[0]), algorithm.overlong_buffer_len
        if buffer is None:
            return reward
        length = max(len(branch.response_ids) for branch in branches)
        return reward - algorithm.overlong_penalty_factor * overlong_penalty(length, longest, buffer)

    rewards = tuple(
        torch.tensor([shaped(branches) for branches in group.conversations()], dtype=torch.float64)
        for group in rollout.groups
    )
    conversations = _conversations(rollout)
    masks = tuple(torch.cat([loss_mask(branch) for branch in branches]) for branches in conversations)
    if not algorithm.kl_coef:
        return ScoredSamples(rewards, masks)
    estimate = losses.kl_divergence(columns["old"].double(), columns["reference"].double(), algorithm.kl_reward_type)
    parts = iter(data.split(estimate))
    joined = [torch.cat([next(parts) for _ in branches]) for branches in conversations]
    kl = [torch.where(mask > 0, mine, 0.0) for mine, mask in zip(joined, masks, strict=True)]
    return ScoredSamples(rewards, masks, tuple(kl))


def _conversations(rollout: Rollout) -> list[list[Sample]]:
    """The branches of every conversation, in the order of the samples."""
    return [branches for group in rollout.groups for branches in group.conversations()]


def _reward(sample: Sample) -> float:
    if sample.reward is None or not math.isfinite(sample.reward):
        raise DataError(
            f"sample {sample.index} of group {sample.group_index} has the reward {sample.reward}, not a finite number: "
            "look at what --rm-type gives for it"
        )
    return sample.reward
