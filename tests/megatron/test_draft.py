"""Draft layers (multi-token prediction) learn what the policy says next, and the policy does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny_hf
from tests.support.single import MODELS, built, free_port, one_process
from tests.support.worker_cases import Case, plan_of, rollout_of
from vime.megatron.logprobs import draft_cross_entropy
from vime.megatron.losses import token_weights
from vime.megatron.microbatch import RolloutTokens
from vime.megatron.objective import Objective
from vime.megatron.optimizer import Optimizer
from vime.megatron.passes import ModelPasses, Packer
from vime.megatron.worker import TrainWorker
from vime.recipe.schema import AlgorithmOptions, ModelOptions, OptimizerOptions, PerfOptions, Recipe

HF = MODELS["deepseek"]


@settings(deadline=None)
@given(st.integers(0, 999), st.sampled_from([0.7, 1.0, 2.0]), st.sampled_from([1, 3, 100]))
def test_the_cross_entropy_its_gradient_and_the_acceptance_are_the_formulas(
    seed: int, temperature: float, chunk: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    draft, policy = (torch.randn(5, 11, generator=draw, dtype=torch.float64) * 2 for _ in range(2))
    weights = torch.rand(5, generator=draw, dtype=torch.float64)
    mine = draft.float().requires_grad_()
    entropy, accepted = draft_cross_entropy(mine, policy.float(), temperature=temperature, chunk=chunk)
    (entropy * weights.float()).sum().backward()
    theirs = draft.clone().requires_grad_()
    log_q, p = (theirs / temperature).log_softmax(-1), (policy / temperature).softmax(-1)
    expected = -(p * log_q).sum(-1)
    (expected * weights).sum().backward()
    assert torch.allclose(entropy.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(accepted.double(), torch.minimum(p, log_q.exp()).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.allclose(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def gradients(layout: Any, *, mtp: bool) -> tuple[dict[str, torch.Tensor], dict[str, float], float]:
    """Gradients by parameter, metrics, and the norm that clips, of one global batch."""
    recipe = Recipe(
        name="r",
        model=ModelOptions(bf16=False, mtp_num_layers=int(mtp)),
        optimizer=OptimizerOptions(lr=1e-3),
        perf=PerfOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=64),
    )
    optimizer = Optimizer(built(HF, layout, mtp=mtp), recipe, total_steps=1)
    passes = ModelPasses(
        optimizer.chunks, Objective(AlgorithmOptions(), 1.0), Packer(recipe.perf, layout), layout.coordinates(0)
    )
    samples = rollout_of(0, HF["vocab_size"]).samples
    data = RolloutTokens.of([(sample.prompt_ids, sample.response_ids) for sample in samples])
    masks = [torch.tensor(sample.loss_mask, dtype=torch.float32) for sample in samples]
    columns = {
        "weights": torch.cat(token_weights(masks, per_token=False)),
        "advantages": torch.randn(data.response_tokens, generator=torch.Generator().manual_seed(1)),
    }
    optimizer.zero_grad()
    metrics = passes.gradients(data, range(len(samples)), columns, 64)
    found = {name: p.main_grad.clone() for name, p in optimizer.chunks[0].module.named_parameters()}
    norm = optimizer.step().grad_norm
    optimizer.close()
    return found, metrics, norm


def test_the_policys_gradients_are_equal_bit_for_bit_with_and_without_the_layer() -> None:
    with one_process() as layout:
        without, plain, norm = gradients(layout, mtp=False)
        with_it, metrics, same_norm = gradients(layout, mtp=True)
    assert metrics["loss"] == plain["loss"]
    assert norm == same_norm
    for name, gradient in without.items():
        assert torch.equal(gradient, with_it[name]), name
    draft = {name: gradient for name, gradient in with_it.items() if name not in without}
    assert draft
    assert all(gradient.any() for name, gradient in draft.items() if "router" not in name and "experts" not in name)
    assert metrics["draft_loss"] > 0
    assert 0 < metrics["draft_acceptance"] < 1


@pytest.mark.e2e
def test_drafts_are_accepted_more_often_after_training_at_a_rate_of_their_own(tmp_path: Path) -> None:
    checkpoint = str(tiny_hf.write_checkpoint(tmp_path / "hf", HF))
    recipe = {
        "model": {"mtp_num_layers": 1, "bf16": False},
        "optimizer": {"lr": 1e-5, "mtp_lr": 1e-2, "adam_eps": 1e-8, "weight_decay": 0.0},
    }
    worker = TrainWorker(plan_of(Case("draft", checkpoint, recipe=recipe), tmp_path), 0)
    try:
        worker.setup("127.0.0.1", free_port())
        results = [worker.train(rollout_of(number % 2, HF["vocab_size"])) for number in range(8)]
    finally:
        worker.close()
    assert results[-1]["train/draft_acceptance"] > results[0]["train/draft_acceptance"] + 0.02
    assert results[-1]["train/draft_loss"] < results[0]["train/draft_loss"]
