"""Losses against formulas written out in float64, one token at a time, and against any way of splitting a batch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vime.megatron import losses

FLOATS = st.floats(-3, 3, width=32)
TOKENS = st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=20)


def reference_policy_loss(log_ratio, advantage, eps, high, c):
    ratio = math.exp(log_ratio)
    clipped = min(max(ratio, 1 - eps), 1 + high)
    loss = max(-ratio * advantage, -clipped * advantage)
    return min(loss, -c * advantage) if c is not None and advantage < 0 else loss


@given(TOKENS, st.sampled_from([None, 3.0]))
def test_the_policy_loss_is_ppo_with_clip_higher_and_dual_clip(tokens, c):
    log_ratio, advantages, _ = (torch.tensor(column) for column in zip(*tokens, strict=True))
    result = losses.clipped_policy_loss(log_ratio, advantages, eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=c)
    expected = [reference_policy_loss(r, a, 0.2, 0.28, c) for r, a, _ in tokens]
    assert result.loss.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(TOKENS)
def test_gradients_of_the_policy_loss_agree_with_differences_in_float64(tokens):
    log_ratio, advantages, _ = (torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True))
    ratio = log_ratio.exp()
    near_a_kink = ((ratio - 0.8).abs() < 1e-3) | ((ratio - 1.28).abs() < 1e-3)
    log_ratio = torch.where(near_a_kink, torch.zeros_like(log_ratio), log_ratio).requires_grad_()
    losses.clipped_policy_loss(log_ratio, advantages, eps_clip=0.2, eps_clip_high=0.28).loss.sum().backward()
    step = 1e-6
    for index in range(len(tokens)):
        value, advantage = float(log_ratio[index].detach()), float(advantages[index])
        up = reference_policy_loss(value + step, advantage, 0.2, 0.28, None)
        down = reference_policy_loss(value - step, advantage, 0.2, 0.28, None)
        assert float(log_ratio.grad[index]) == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-5)


@given(FLOATS, FLOATS)
def test_kl_estimates_are_their_formulas(log_prob, reference):
    d = log_prob - reference
    k3 = math.exp(-d) - 1 + d
    expected = {"k1": d, "k2": d * d / 2, "k3": k3, "low_var_kl": max(-10.0, min(10.0, k3))}
    for kind, value in expected.items():
        got = losses.kl_divergence(torch.tensor([log_prob]), torch.tensor([reference]), kind)
        assert float(got) == pytest.approx(value, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["k3", "low_var_kl"])
def test_no_log_prob_makes_the_gradient_of_the_kl_nan(kind):
    log_probs = torch.tensor([-1e4, -80.0, 0.0], requires_grad=True)
    losses.kl_divergence(log_probs, torch.tensor([0.0, 0.0, -1e4]), kind).sum().backward()
    assert torch.isfinite(log_probs.grad).all()


MASKS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8)


@given(MASKS, st.booleans(), st.randoms(use_true_random=False))
def test_the_loss_is_the_same_for_every_split_and_order_of_the_batch(masks, per_token, random):
    tensors = [torch.tensor(mask) for mask in masks]
    weights = losses.token_weights(tensors, per_token=per_token)
    values = [torch.tensor([random.uniform(-2, 2) for _ in mask]) for mask in masks]
    pieces = list(zip(values, weights, strict=True))
    random.shuffle(pieces)
    cut = random.randint(0, len(pieces))
    halves = [pieces[:cut], pieces[cut:]]
    split = sum(
        float(losses.weighted_sum(torch.cat([v for v, _ in half]), torch.cat([w for _, w in half])))
        for half in halves
        if half
    )
    if per_token:
        total = max(sum(map(sum, masks)), 1)
        expected = sum(float((v * t).sum()) for v, t in zip(values, tensors, strict=True)) / total
    else:
        means = [float((v * t).sum() / max(int(t.sum()), 1)) for v, t in zip(values, tensors, strict=True)]
        expected = sum(means) / len(means)
    assert split == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_masked_tokens_may_hold_nan_without_harm():
    values = torch.tensor([1.0, float("nan")], requires_grad=True)
    loss = losses.weighted_sum(values, torch.tensor([0.5, 0.0]))
    loss.backward()
    assert loss.item() == 0.5
    assert values.grad.tolist() == [0.5, 0.0]


@given(TOKENS)
def test_gspo_has_the_gradient_of_the_geometric_mean_ratio(tokens):
    new, old, _ = (torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True))
    direct = new.clone().requires_grad_()
    ((direct - old).mean()).exp().backward()
    token_wise = new.clone().requires_grad_()
    mean = (token_wise - old).mean().expand(len(tokens))
    ratios = losses.sequence_log_ratio(token_wise, mean).exp()
    ratios.mean().backward()
    assert torch.allclose(direct.grad, token_wise.grad, rtol=1e-6, atol=1e-9)


def test_cispo_clips_the_weight_and_keeps_the_token():
    log_probs = torch.tensor([-1.0, -1.0], requires_grad=True)
    result = losses.cispo_loss(log_probs, torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0]), eps_clip=0.2)
    result.loss.sum().backward()
    assert log_probs.grad.tolist() == pytest.approx([-1.2, -1.0])
    assert result.clipped.tolist() == [True, False]


@given(MASKS, st.integers(1, 40))
def test_a_constant_length_weighs_every_trained_token_alike(masks, length):
    weights = losses.token_weights([torch.tensor(mask) for mask in masks], per_token=False, length=length)
    for mask, mine in zip(masks, weights, strict=True):
        assert mine.tolist() == pytest.approx([one / length / len(masks) for one in mask])
