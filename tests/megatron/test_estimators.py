"""Advantage estimators against their formulas in float64, sample by sample."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.megatron import estimators
from vime.megatron.estimators import ScoredSamples, group_advantages, whiten
from vime.megatron.plugins import function_of
from vime.recipe.algorithms import ADVANTAGE_TERMS, CORRECTIONS, ESTIMATORS, POLICY_LOSSES
from vime.recipe.schema import AlgorithmOptions

DOCS = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
REWARDS = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=16)


def samples_of(rewards: list[list[float]], lengths: list[int], **more: Any) -> ScoredSamples:
    groups = tuple(torch.tensor(group, dtype=torch.float64) for group in rewards)
    return ScoredSamples(groups, tuple(torch.ones(length) for length in lengths), **more)


@pytest.mark.parametrize("table", [ESTIMATORS, ADVANTAGE_TERMS, POLICY_LOSSES, CORRECTIONS])
def test_every_entry_names_a_function_flags_that_exist_and_its_source(table: Any) -> None:
    for name, entry in table.items():
        assert callable(function_of(entry.function, name))
        assert set(entry.flags) <= AlgorithmOptions.model_fields.keys()
        assert entry.formula
        assert "arXiv" in entry.source or "202" in entry.source
        assert f"`{name}`" in DOCS or f"`--{name.replace('_', '-')}`" in DOCS
    assert {entry.policy_loss for entry in ESTIMATORS.values()} <= POLICY_LOSSES.keys()


@settings(deadline=None)
@given(REWARDS)
def test_group_advantages_have_zero_mean_and_unit_deviation(rewards: list[float]) -> None:
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    assert torch.isfinite(advantages).all()
    assert float(advantages.mean()) == pytest.approx(0, abs=1e-9)
    if max(rewards) - min(rewards) > 0.1:
        assert float(advantages.std()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("rewards", [[1.0], [0.0, 0.0, 0.0], [0.1] * 7])
def test_a_group_of_one_or_of_equal_rewards_has_no_advantage(rewards: list[float]) -> None:
    assert group_advantages(torch.tensor(rewards)).tolist() == [0.0] * len(rewards)


@settings(deadline=None)
@given(REWARDS, st.randoms(use_true_random=False))
def test_tokens_are_whitened_over_the_whole_rollout_or_samples_are(values: list[float], random: Any) -> None:
    lengths = [random.randint(0, 9) for _ in values]
    masks = [torch.tensor([float(random.random() < 0.7) for _ in range(length)]) for length in lengths]
    columns = [torch.full((length,), value, dtype=torch.float64) for value, length in zip(values, lengths, strict=True)]
    trained = [value for value, mask in zip(values, masks, strict=True) for _ in range(int(mask.sum()))]
    once = [value for value, mask in zip(values, masks, strict=True) if mask.any()]
    for over, counted in (("tokens", trained), ("samples", once)):
        found = whiten(columns, masks, over)  # type: ignore[arg-type]
        if len(counted) < 2:
            assert not any(column.any() for column in found)
            continue
        mean, spread = statistics.fmean(counted), math.sqrt(statistics.variance(counted) + 1e-8)
        for value, column in zip(values, found, strict=True):
            assert column.tolist() == pytest.approx([(value - mean) / spread] * len(column), rel=1e-6, abs=1e-6)


def test_reinforce_plus_plus_counts_tokens_so_a_long_sample_weighs_more() -> None:
    samples = samples_of([[1.0, 0.0]], [1, 3])
    long, short = (column[0] for column in reversed(estimators.reinforce_plus_plus(samples, AlgorithmOptions())))
    mean, spread = 0.25, math.sqrt((0.75**2 + 3 * 0.25**2) / 3)
    assert (float(short), float(long)) == pytest.approx(((1 - mean) / spread, -mean / spread), rel=1e-6)
    per_sample = AlgorithmOptions(normalize_advantages_over="samples")
    assert float(estimators.reinforce_plus_plus(samples, per_sample)[1][0]) == pytest.approx(-0.5 / math.sqrt(0.5))


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_a_token_answers_for_the_kl_of_the_tokens_from_it_on(name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rewards, lengths = [[1.0, 0.0, 0.5], [2.0]], [3, 1, 4, 2]
    kl = tuple(torch.randn(length, generator=draw, dtype=torch.float64) for length in lengths)
    options = AlgorithmOptions(kl_coef=0.3)
    found = getattr(estimators, name)(samples_of(rewards, lengths, kl=kl), options)
    values = []
    for group, numbers in zip(rewards, ([0, 1, 2], [3]), strict=True):
        baseline = statistics.fmean(group) if name.endswith("baseline") else 0.0
        for reward, number in zip(group, numbers, strict=True):
            values += [reward - baseline - 0.3 * float(kl[number][t:].sum()) for t in range(lengths[number])]
    mean, spread = statistics.fmean(values), math.sqrt(statistics.variance(values) + 1e-8)
    assert torch.cat(found).tolist() == pytest.approx([(value - mean) / spread for value in values], rel=1e-6, abs=1e-9)


def test_grpo_takes_the_whole_kl_of_a_sample_off_its_reward() -> None:
    kl = tuple(torch.tensor(values, dtype=torch.float64) for values in ([0.5, 0.5], [0.0], [-1.0, 0.0, 2.0]))
    samples = samples_of([[1.0, 0.0, 0.5]], [2, 1, 3], kl=kl)
    found = estimators.grpo(samples, AlgorithmOptions(kl_coef=0.2))
    expected = group_advantages(torch.tensor([0.8, 0.0, 0.3], dtype=torch.float64))
    assert [column[0] for column in found] == pytest.approx(expected.tolist())
    assert all((column == column[0]).all() for column in found)


def test_equal_rewards_stay_without_advantage_when_whitened() -> None:
    samples = samples_of([[0.1] * 3, [0.1] * 2], [4, 0, 7, 1, 2])
    for name in ESTIMATORS:
        options = AlgorithmOptions(advantage_estimator=name, normalize_advantages=True)
        found = function_of(ESTIMATORS[name].function, name)(samples, options)
        assert torch.cat(found).tolist() == pytest.approx([0.0] * 14, abs=1e-9)


def test_without_the_deviation_a_group_keeps_its_scale() -> None:
    options = AlgorithmOptions(disable_grpo_std_normalization=True)
    found = estimators.grpo(samples_of([[4.0, 0.0], [1.0, 1.0]], [1, 2, 1, 1]), options)
    assert [float(column[0]) for column in found] == [2.0, -2.0, 0.0, 0.0]


@pytest.mark.parametrize(("length", "penalty"), [(0, 0), (60, 0), (80, 0), (85, 0.25), (99, 0.95), (100, 1), (140, 1)])
def test_a_response_loses_reward_over_the_last_tokens_before_its_end(length: int, penalty: float) -> None:
    assert estimators.overlong_penalty(length, 100, 20) == pytest.approx(penalty)
