"""The loss of packed micro-batches against a float64 reference that goes through samples and tokens one by one."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.megatron import losses
from vime.megatron.microbatch import Padding, RolloutTokens, make_batch
from vime.megatron.objective import METRICS, Objective
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import AlgorithmOptions

VOCABULARY = 11
TEMPERATURE = 0.8
CPU = torch.device("cpu")


class Problem:
    """Samples with logits at every position and all columns."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.pairs = [
            (
                [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 5))],
                [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))],
            )
            for _ in range(7)
        ]
        self.masks = [torch.tensor([float(draw.random() < 0.8) for _ in response]) for _, response in self.pairs]
        self.masks[3].zero_()
        self.data = RolloutTokens.of(self.pairs)
        torch.manual_seed(seed)
        self.logits = [torch.randn(len(p) + len(r), VOCABULARY, dtype=torch.float64) for p, r in self.pairs]
        self.columns = {
            name: torch.randn(self.data.response_tokens) * 0.3 - 2
            for name in ("old", "reference", "rollout", "teacher")
        }
        self.columns["advantages"] = torch.cat(
            [torch.full((len(r),), draw.uniform(-2, 2)) for _, r in self.pairs]
        )  # fmt: skip


def packed_loss(
    problem: Problem, options: AlgorithmOptions, parts: list[list[int]], layout: ParallelLayout | None = None
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Loss, metrics and gradient of the logits of every sample, over these micro-batches and context-parallel ranks."""
    layout = layout or ParallelLayout()
    logits = [value.float().requires_grad_() for value in problem.logits]
    lengths = [len(value) for value in logits]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    rows = torch.cat([*logits, torch.zeros(1, VOCABULARY)])
    weights = torch.cat(losses.token_weights(problem.masks, per_token=options.calculate_per_token_loss))
    columns = {**problem.columns, "weights": weights}
    objective = Objective(options, TEMPERATURE)
    total, sums = torch.zeros(()), torch.zeros(len(METRICS))
    for members in parts:
        for rank in range(layout.cp):
            batch = make_batch(
                problem.data, members, Padding.of(layout), cp_rank=rank, cp_size=layout.cp, device=CPU
            )  # fmt: skip
            # Positions that fill a sequence up have the row of zeros at the end.
            index = [
                starts[members[sample]] + position if members and position < lengths[members[sample]] else -1
                for sample, position in zip(batch.samples.tolist(), batch.positions[0].tolist(), strict=True)
            ]
            loss, metrics = objective(rows[index], batch, columns)
            total = total + loss
            sums += metrics
    total.backward()
    gradients = [value.grad if value.grad is not None else torch.zeros_like(value) for value in logits]
    return float(total.detach()), dict(zip(METRICS, sums.tolist(), strict=True)), gradients


def reference_correction(
    name: str,
    options: AlgorithmOptions,
    log_pi: torch.Tensor,
    old: torch.Tensor,
    rollout: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Weights of a sample's tokens by the formula of a mismatch correction."""
    low, high, trained = options.tis_clip_low, options.tis_clip, max(float(mask.sum()), 1.0)
    token, product = (old - rollout).exp(), ((old - rollout) * mask).sum().exp().expand(len(mask))
    if name in ("tis", "seq_tis"):
        return (token if name == "tis" else product).clamp(low, high)
    if name in ("icepop", "seq_mis"):
        ratio = token if name == "icepop" else product
        return ratio * ((ratio >= low) & (ratio <= high))
    if name == "geo_mask":
        mean = product.log().div(trained).exp()
        return ((mean >= options.geo_mask_low) & (mean <= options.geo_mask_high)).double()
    assert name == "opsm"
    moved = float(((rollout - log_pi) * mask).sum()) / trained
    return 1.0 - ((advantage < 0) & (moved > options.opsm_delta)).double()


def reference_loss(problem: Problem, options: AlgorithmOptions) -> tuple[float, list[torch.Tensor]]:
    """The same by the formulas, sample by sample in float64."""
    logits = [value.clone().requires_grad_() for value in problem.logits]
    high = options.eps_clip if options.eps_clip_high is None else options.eps_clip_high
    all_tokens = sum(float(mask.sum()) for mask in problem.masks)
    total = torch.zeros((), dtype=torch.float64)
    for sample, (prompt, response) in enumerate(problem.pairs):
        mask = problem.masks[sample].double()
        log_softmax = (logits[sample][len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        log_pi = log_softmax[range(len(response)), response]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        span = problem.data.response(sample)
        old, reference, rollout, advantage = (
            problem.columns[name][span].double() for name in ("old", "reference", "rollout", "advantages")
        )
        trained = float(mask.sum())
        if options.loss_type == "sft_loss":
            token = -log_pi
        else:
            log_ratio = log_pi - old
            if options.advantage_estimator == "gspo":
                ratio = ((log_ratio * mask).sum() / max(trained, 1)).exp().expand(len(response))
            else:
                ratio = log_ratio.exp()
            bounded = ratio.clamp(1 - options.eps_clip, 1 + high)
            if options.advantage_estimator == "cispo":
                token = -bounded.detach() * advantage * log_pi
            else:
                token = torch.maximum(-ratio * advantage, -bounded * advantage)
                if options.eps_clip_c is not None:
                    limit = -options.eps_clip_c * advantage
                    token = torch.where(advantage < 0, torch.minimum(token, limit), token)
            for name in options.corrections:
                token = token * reference_correction(name, options, log_pi.detach(), old, rollout, advantage, mask)
            d = log_pi - reference
            kl = {"k1": d, "k2": d * d / 2, "k3": (-d).exp() - 1 + d, "low_var_kl": ((-d).exp() - 1 + d).clamp(-10, 10)}
            token = token - options.entropy_coef * entropy
            if options.use_kl_loss:
                token = token + options.kl_loss_coef * kl[options.kl_loss_type]
        share = 1 / all_tokens if options.calculate_per_token_loss else 1 / max(trained, 1) / len(problem.pairs)
        total = total + (token * mask).sum() * share
    total.backward()
    found = [value.grad for value in logits]
    return float(total.detach()), [torch.zeros(0) if g is None else g for g in found]


OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"eps_clip_high": 0.28},
    "grpo_per_token": {"calculate_per_token_loss": True},
    "dual_clip": {"eps_clip_c": 1.5},
    "gspo": {"advantage_estimator": "gspo", "eps_clip": 0.05},
    "cispo": {"advantage_estimator": "cispo"},
    "reinforce": {"advantage_estimator": "reinforce_plus_plus"},
    "reinforce_baseline": {"advantage_estimator": "reinforce_plus_plus_baseline", "entropy_coef": 0.02},
    "entropy": {"entropy_coef": 0.01},
    "tis": {"use_tis": True, "tis_clip": 1.1},
    "tis_low": {"use_tis": True, "tis_clip": 1.1, "tis_clip_low": 0.9},
    "icepop": {"mismatch_correction": ["icepop"], "tis_clip": 1.3, "tis_clip_low": 0.8},
    "seq_tis": {"mismatch_correction": ["seq_tis"], "tis_clip": 1.2, "tis_clip_low": 0.7},
    "seq_mis": {"mismatch_correction": ["seq_mis"], "tis_clip": 2.5, "tis_clip_low": 0.3},
    "geo_mask": {"mismatch_correction": ["geo_mask", "tis"], "geo_mask_low": 0.9, "geo_mask_high": 1.15},
    "opsm": {"mismatch_correction": ["opsm"], "opsm_delta": 0.8},
    "k1": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k1"},
    "k2": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k2"},
    "k3": {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3"},
    "low_var_kl": {"use_kl_loss": True, "kl_loss_coef": 0.3},
    "sft": {"loss_type": "sft_loss"},
}
SEQUENCE_WIDE = {"gspo", "seq_tis", "seq_mis", "geo_mask", "opsm"}
PARTS = {"one": [[0, 1, 2, 3, 4, 5, 6]], "each": [[i] for i in range(7)], "mixed": [[6, 0, 3], [], [5, 1], [2, 4]]}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("parts", PARTS)
def test_loss_and_gradient_are_the_formulas_for_every_packing(name: str, parts: str) -> None:
    options = AlgorithmOptions(**OPTIONS[name])
    for seed in range(3):
        problem = Problem(seed)
        expected, expected_gradients = reference_loss(problem, options)
        loss, metrics, gradients = packed_loss(problem, options, PARTS[parts])
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        # GSPO's gradient of the geometric mean reaches a token through the mean of the sample.
        for mine, theirs in zip(gradients, expected_gradients, strict=True):
            assert torch.allclose(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([name for name in OPTIONS if name not in SEQUENCE_WIDE]),
    st.integers(0, 99),
    st.permutations(range(7)),
    st.sets(st.integers(1, 6)),
    st.sampled_from([1, 2, 4]),
)
def test_no_order_packing_number_of_micro_batches_or_context_parallel_size_changes_loss_and_gradient(
    name: str, seed: int, order: list[int], cuts: set[int], cp: int
) -> None:
    """Which data-parallel rank takes a micro-batch cannot matter either: the loss is a sum over all of them. What
    looks at whole samples is left out: it needs the sums of real context-parallel ranks, as in the table of layouts."""
    problem, options = Problem(seed), AlgorithmOptions(**OPTIONS[name])
    bounds = [0, *sorted(cuts), 7]
    parts = [list(order[start:end]) for start, end in itertools.pairwise(bounds)]
    loss, metrics, gradients = packed_loss(problem, options, parts, ParallelLayout(world_size=cp, cp=cp))
    expected, expected_metrics, expected_gradients = packed_loss(problem, options, PARTS["one"])
    assert loss == pytest.approx(expected, rel=1e-5, abs=2e-6)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=2e-6)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["icepop", "seq_mis", "geo_mask", "opsm"])
def test_masks_mask_some_tokens_and_are_counted(name: str) -> None:
    masked = [packed_loss(Problem(seed), AlgorithmOptions(**OPTIONS[name]), PARTS["one"])[1] for seed in range(3)]
    assert 0 < sum(metrics["tis_masked"] for metrics in masked) / 3 < 1


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_the_reverse_kl_to_the_teacher_is_the_mean_over_trained_tokens_for_every_packing_and_slice(
    parts: str, cp: int
) -> None:
    problem = Problem(4)
    layout = ParallelLayout(world_size=cp, cp=cp)
    metrics = packed_loss(problem, AlgorithmOptions(use_opd=True), PARTS[parts], layout)[1]
    expected = 0.0
    for sample, mask in enumerate(problem.masks):
        span = problem.data.response(sample)
        difference = (problem.columns["old"][span].double() - problem.columns["teacher"][span].double()) * mask
        expected += float(difference.sum()) / max(float(mask.sum()), 1.0) / len(problem.masks)
    assert metrics["opd_reverse_kl"] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_with_the_engines_log_probs_as_old_policy_the_difference_is_that_of_the_current_one() -> None:
    problem = Problem(2)
    problem.columns["old"] = problem.columns["rollout"]
    metrics = packed_loss(problem, AlgorithmOptions(use_rollout_logprobs=True), PARTS["one"])[1]
    assert metrics["train_rollout_logprob_abs_diff"] > 0.1


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_is_policy_gradient() -> None:
    problem = Problem(1)
    del problem.columns["old"]
    loss, metrics, gradients = packed_loss(problem, AlgorithmOptions(), PARTS["one"])
    advantages = [float(problem.columns["advantages"][problem.data.response(i)][0]) for i in range(7)]
    trained = [bool(mask.any()) for mask in problem.masks]
    expected = -sum(a for a, t in zip(advantages, trained, strict=True) if t) / 7
    assert loss == pytest.approx(expected, rel=1e-5)
    assert (metrics["ppo_kl"], metrics["pg_clipfrac"]) == (0.0, 0.0)
    assert all(math.isfinite(float(gradient.sum())) for gradient in gradients)
