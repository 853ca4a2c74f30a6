"""Rewards become advantages as the formulas say; what cannot be one is named."""

from __future__ import annotations

import math

import pytest
import torch

from vime.errors import DataError
from vime.megatron.advantages import advantage_column, loss_mask
from vime.megatron.microbatch import RolloutTokens
from vime.recipe.schema import AlgorithmOptions
from vime.samples import Group, Rollout, Sample

REWARDS = [[1.0, 0.0, 0.0], [0.5, 0.5], [2.0]]


def rollout_of(rewards: list[list[float]], lengths: list[int]) -> tuple[Rollout, RolloutTokens]:
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


def test_every_token_of_a_sample_has_the_samples_advantage_and_empty_responses_have_none() -> None:
    rollout, data = rollout_of(REWARDS, [3, 0, 2])
    column = advantage_column(rollout, data, {}, AlgorithmOptions())
    spread = math.sqrt(1 / 3)
    expected = [(2 / 3) / spread] * 3 + [(-1 / 3) / spread] * 2 + [0.0] * 5
    assert column.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_equal_rewards_everywhere_give_zeros(estimator: str) -> None:
    rollout, data = rollout_of([[0.1] * 3, [0.1] * 2], [4])
    column = advantage_column(rollout, data, {}, AlgorithmOptions(advantage_estimator=estimator))  # type: ignore[arg-type]
    assert column.tolist() == pytest.approx([0.0] * 20, abs=1e-6)


def test_reinforce_plus_plus_is_the_reward_in_deviations_of_the_whole_batch() -> None:
    rollout, data = rollout_of(REWARDS, [1])
    flat = [reward for group in REWARDS for reward in group]
    mean = sum(flat) / 6
    spread = math.sqrt(sum((reward - mean) ** 2 for reward in flat) / 5)
    plain = advantage_column(rollout, data, {}, AlgorithmOptions(advantage_estimator="reinforce_plus_plus"))
    assert plain.tolist() == pytest.approx([(reward - mean) / spread for reward in flat], rel=1e-5)
    centred = [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0]
    spread = math.sqrt(sum(value**2 for value in centred) / 5)
    options = AlgorithmOptions(advantage_estimator="reinforce_plus_plus_baseline")
    baseline = advantage_column(rollout, data, {}, options)
    assert baseline.tolist() == pytest.approx([value / spread for value in centred], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_the_kl_of_a_samples_trained_tokens_lessens_its_reward(kind: str) -> None:
    rollout, data = rollout_of([[1.0, 0.0]], [3])
    rollout.samples[0].loss_mask = [1, 0, 1]
    old = torch.tensor([-1.0, float("nan"), -2.0, -0.5, -0.7, -3.0])
    reference = torch.tensor([-1.5, -9.0, -1.0, -0.5, -1.0, -2.0])
    options = AlgorithmOptions(kl_coef=0.3, kl_loss_type=kind)  # type: ignore[arg-type]
    found = advantage_column(rollout, data, {"old": old, "reference": reference}, options)

    def kl(d: float) -> float:
        k3 = math.exp(-d) - 1 + d
        return {"k1": d, "k2": d * d / 2, "k3": k3, "low_var_kl": max(-10.0, min(10.0, k3))}[kind]

    first = 1.0 - 0.3 * (kl(0.5) + kl(-1.0))
    second = 0.0 - 0.3 * (kl(0.0) + kl(0.3) + kl(-1.0))
    size = (first - second) / 2 / (math.sqrt(2) * abs(first - second) / 2)
    assert found.tolist() == pytest.approx([size] * 3 + [-size] * 3, rel=1e-4)


@pytest.mark.parametrize("reward", [None, math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_finite_number_is_named(reward: float | None) -> None:
    rollout, data = rollout_of(REWARDS, [2])
    rollout.samples[4].reward = reward
    with pytest.raises(DataError, match=f"sample 4 of group 1 has the reward {reward}, not a finite number"):
        advantage_column(rollout, data, {}, AlgorithmOptions())


def test_without_a_mask_every_token_counts_and_another_length_is_an_error() -> None:
    sample = Sample(7, 0, "", [1], response_ids=[1, 2, 3])
    assert loss_mask(sample).tolist() == [1.0, 1.0, 1.0]
    sample.loss_mask = [1, 0]
    with pytest.raises(DataError, match="sample 7 has 3 response tokens, 2 in its mask"):
        loss_mask(sample)
