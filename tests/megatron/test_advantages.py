"""Rewards become advantages as the formulas say; what cannot be one is named."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.small_rollouts import rollout_of
from vime.errors import DataError
from vime.megatron.advantages import advantage_column, loss_mask
from vime.recipe.schema import AlgorithmOptions
from vime.samples import Sample

REWARDS = [[1.0, 0.0, 0.0], [0.5, 0.5], [2.0]]


def test_every_token_of_a_sample_has_the_samples_advantage_and_empty_responses_have_none() -> None:
    rollout, data = rollout_of(REWARDS, [3, 0, 2])
    column = advantage_column(rollout, data, {}, AlgorithmOptions())
    spread = math.sqrt(1 / 3)
    expected = [(2 / 3) / spread] * 3 + [(-1 / 3) / spread] * 2 + [0.0] * 5
    assert column.tolist() == pytest.approx(expected, rel=1e-5)


def test_untrained_tokens_do_not_count_when_a_rollout_is_whitened() -> None:
    rollout, data = rollout_of([[1.0, 0.0]], [1, 4])
    rollout.samples[1].loss_mask = [1, 0, 0, 0]
    options = AlgorithmOptions(advantage_estimator="reinforce_plus_plus")
    column = advantage_column(rollout, data, {}, options)
    assert column[:2].tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-5)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_the_branches_of_a_conversation_are_normalised_as_one(estimator: str) -> None:
    """A conversation of three branches weighs as one with all of their tokens."""
    options = AlgorithmOptions(advantage_estimator=estimator)
    whole, data = rollout_of([[1.0, 0.0, 0.25]], [6, 4, 2])
    expected = advantage_column(whole, data, {}, options)
    parts, split = rollout_of([[1.0, 1.0, 1.0, 0.0, 0.25]], [1, 2, 3, 4, 2])
    for place, (index, branch) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]):
        parts.samples[place].index, parts.samples[place].branch = index, branch
    assert advantage_column(parts, split, {}, options).tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl"])
def test_the_kl_of_a_samples_trained_tokens_lessens_its_reward(kind: str) -> None:
    rollout, data = rollout_of([[1.0, 0.0]], [3])
    rollout.samples[0].loss_mask = [1, 0, 1]
    old = torch.tensor([-1.0, float("nan"), -2.0, -0.5, -0.7, -3.0])
    reference = torch.tensor([-1.5, -9.0, -1.0, -0.5, -1.0, -2.0])
    options = AlgorithmOptions(kl_coef=0.3, kl_reward_type=kind)  # type: ignore[arg-type]
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


def test_a_long_response_has_less_reward_than_a_short_one() -> None:
    rollout, data = rollout_of([[1.0, 1.0]], [2, 10])
    options = AlgorithmOptions(overlong_buffer_len=4, overlong_penalty_factor=0.5, disable_grpo_std_normalization=True)
    column = advantage_column(rollout, data, {}, options, 10)
    assert column.tolist() == pytest.approx([0.25] * 2 + [-0.25] * 10)
