"""On-policy distillation against its formulas in float64: the advantages, and the gradient that they give."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.small_rollouts import rollout_of
from vime.errors import DataError
from vime.megatron.advantages import advantage_column, teacher_column
from vime.megatron.estimators import DistilledTokens, reverse_kl
from vime.megatron.plugins import function_of
from vime.megatron.policy_losses import TokenTerms
from vime.recipe.algorithms import ESTIMATORS, POLICY_LOSSES, PURE_DISTILLATION
from vime.recipe.schema import AlgorithmOptions, Recipe

REWARDS = [[1.0, 0.0, 0.5], [2.0, -1.0]]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), coefficient=st.floats(0, 5, width=32))
def test_every_estimator_gets_minus_coefficient_times_the_log_ratio_of_each_trained_token(
    estimator: str, seed: int, coefficient: float
) -> None:
    draw = random.Random(seed)
    rollout, data = rollout_of(REWARDS, [3, 0, 5, 1])
    old, teacher, masks = [], [], []
    for sample in rollout.samples:
        sample.loss_mask = [int(draw.random() < 0.7) for _ in sample.response_ids]
        sample.teacher_log_probs = [draw.uniform(-9, 0) for _ in sample.response_ids]
        # What was given to the student has no log-prob that counts.
        old += [draw.uniform(-9, 0) if mask else math.nan for mask in sample.loss_mask]
        teacher += sample.teacher_log_probs
        masks += sample.loss_mask
    columns = {"old": torch.tensor(old), "teacher": teacher_column(rollout)}
    options = AlgorithmOptions(advantage_estimator=estimator, use_opd=True, opd_kl_coef=coefficient)
    plain = advantage_column(rollout, data, {}, options.model_copy(update={"use_opd": False}))
    found = advantage_column(rollout, data, columns, options)
    for value, without, mine, theirs, mask in zip(found.tolist(), plain.tolist(), old, teacher, masks, strict=True):
        expected = without - coefficient * (mine - theirs) if mask else without
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_pure_distillation_looks_at_no_reward() -> None:
    high, low = rollout_of([[9.0, -9.0]], [2])[0], rollout_of([[0.0, 0.0]], [2])[0]
    found = []
    for rollout in (high, low):
        for sample in rollout.samples:
            sample.teacher_log_probs = [-1.0, -3.0]
        data = rollout_of([[0.0, 0.0]], [2])[1]
        columns = {"old": torch.full((4,), -2.0), "teacher": teacher_column(rollout)}
        options = AlgorithmOptions(advantage_estimator=PURE_DISTILLATION, use_opd=True, normalize_advantages=True)
        found.append(advantage_column(rollout, data, columns, options).tolist())
    assert found[0] == found[1] == [1.0, -1.0, 1.0, -1.0]


@pytest.mark.parametrize("name", POLICY_LOSSES)
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), coefficient=st.sampled_from([0.25, 1.0, 3.0]))
def test_the_expected_gradient_is_that_of_the_reverse_kl(name: str, seed: int, coefficient: float) -> None:
    """The mean over what the student may sample at a position, in float64, for every policy loss."""
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(7, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, generator=draw, dtype=torch.float64).log_softmax(-1)
    log_probs = student.log_softmax(-1)
    old, probabilities = log_probs.detach(), log_probs.detach().exp()
    options = AlgorithmOptions(use_opd=True, opd_kl_coef=coefficient)
    advantages = reverse_kl(DistilledTokens(old, teacher, torch.ones(7)), options)
    # Each entry stands for a response of this one token, so that a sample's mean is the token itself.
    terms = TokenTerms(log_probs, old, advantages, probabilities, lambda values: values.detach())
    loss = function_of(POLICY_LOSSES[name].function, name)(terms, options).loss
    (found,) = torch.autograd.grad((probabilities * loss).sum(), student, retain_graph=True)
    exact = coefficient * (log_probs.exp() * (log_probs - teacher)).sum()
    (expected,) = torch.autograd.grad(exact, student)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    values = torch.tensor([-0.5, -7.0, -2.5])
    assert reverse_kl(DistilledTokens(values, values, torch.ones(3)), AlgorithmOptions()).tolist() == [0.0] * 3


def test_a_sample_that_the_teacher_did_not_score_is_named() -> None:
    rollout, _ = rollout_of([[1.0, 0.0]], [2])
    rollout.samples[0].teacher_log_probs = [-1.0, -1.0]
    rollout.samples[1].teacher_log_probs = [-1.0]
    with pytest.raises(DataError, match="sample 1 has 2 response tokens and 1 log-probs of the teacher"):
        teacher_column(rollout)


def test_distillation_needs_the_old_policys_and_the_teachers_log_probs() -> None:
    assert AlgorithmOptions(use_opd=True).needed_columns == {"old", "teacher"}
    assert not AlgorithmOptions().needed_columns
    assert not Recipe(name="r", algorithm=AlgorithmOptions(use_opd=True)).needs_reference
