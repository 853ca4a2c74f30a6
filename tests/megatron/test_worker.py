"""One rank alone: what it makes of unusual rollouts, when it keeps a reference, and supervised fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.support import tiny_hf
from tests.support.single import MODELS, free_port
from tests.support.worker_cases import Case, plan_of, rollout_of
from vime.errors import DataError
from vime.megatron.optimizer import GradientsNotFinite
from vime.megatron.worker import TrainWorker
from vime.samples import Rollout

QUIET: dict[str, Any] = {"weight_decay": 0.0}
UNBOUNDED: dict[str, Any] = {"advantage_estimator": "tests.support.algorithm_plugins:leave_one_out"}
"""Advantages as large as the rewards: an estimator from outside."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_hf.write_checkpoint(tmp_path_factory.mktemp("worker") / "hf", MODELS["qwen3"]))


@contextlib.contextmanager
def worker_of(checkpoint: str, folder: Path, **groups: dict[str, Any]) -> Iterator[TrainWorker]:
    worker = TrainWorker(plan_of(Case("one", checkpoint, recipe=groups), folder), 0)
    try:
        worker.setup("127.0.0.1", free_port())
        yield worker
    finally:
        worker.close()


def scores_of(worker: TrainWorker, rollout: Rollout) -> list[list[float]]:
    return worker.log_probs([(sample.prompt_ids, sample.response_ids) for sample in rollout.samples])


def ordinary(number: int = 0) -> Rollout:
    return rollout_of(number, MODELS["qwen3"]["vocab_size"])


def with_rewards_times(factor: float, number: int) -> Rollout:
    """Rewards that are finite, and with UNBOUNDED advantages that are not, in fp32."""
    rollout = ordinary(number)
    for sample in rollout.samples:
        sample.reward = factor * float(sample.reward or 0.0)
    return rollout


def test_empty_responses_train_nothing_and_the_others_are_trained(checkpoint: str, tmp_path: Path) -> None:
    some, none = ordinary(), ordinary()
    for sample in [*some.samples[4:7], *none.samples]:
        sample.response_ids, sample.log_probs, sample.loss_mask = [], [], []
    with worker_of(checkpoint, tmp_path, optimizer=QUIET) as worker:
        before = scores_of(worker, ordinary())
        nothing = worker.train(none)
        assert (nothing["train/loss"], nothing["train/grad_norm"], nothing["train/skipped_steps"]) == (0.0, 0.0, 0.0)
        assert scores_of(worker, ordinary()) == before
        trained = worker.train(some)
        assert trained["train/grad_norm"] > 0
        assert trained["train/skipped_steps"] == 0


def test_groups_of_equal_rewards_have_no_gradient(checkpoint: str, tmp_path: Path) -> None:
    rollout = ordinary()
    for sample in rollout.samples:
        sample.reward = 0.3
    with worker_of(checkpoint, tmp_path, optimizer=QUIET) as worker:
        before = scores_of(worker, rollout)
        metrics = worker.train(rollout)
        assert (metrics["train/pg_loss"], metrics["train/grad_norm"]) == (0.0, 0.0)
        assert scores_of(worker, rollout) == before


def test_every_master_weight_is_held_against_the_model_after_a_load(checkpoint: str, tmp_path: Path) -> None:
    with worker_of(checkpoint, tmp_path, model={"bf16": True}) as worker:
        optimizer, chunk = worker._ready.optimizer, cast(Any, worker._ready.chunks[0])
        pairs = list(optimizer._master_pairs())
        assert sum(master.numel() for _, master in pairs) == sum(p.numel() for p in chunk.parameters())
        assert {(model.dtype, master.dtype) for model, master in pairs} == {(torch.bfloat16, torch.float32)}
        optimizer.check_master_weights()
        with torch.no_grad():
            chunk.decoder.layers[1].mlp.linear_fc2.weight[3, 5] += 0.5
        with pytest.raises(AssertionError, match="the master weights of a shard of 6144 elements are not the model's"):
            optimizer.check_master_weights()
        worker._ready.checkpointer.took_weights()
        optimizer.check_master_weights()


def test_gradients_that_are_not_finite_skip_the_step_are_named_and_end_the_run(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned = with_rewards_times(1e40, 1)
    with worker_of(checkpoint, tmp_path, algorithm=UNBOUNDED, optimizer=QUIET) as worker:
        worker.train(ordinary())
        before = scores_of(worker, ordinary())
        metrics = worker.train(poisoned)
        assert metrics["train/skipped_steps"] == 2
        assert scores_of(worker, ordinary()) == before
        with pytest.raises(
            GradientsNotFinite, match=r"not finite in 3 steps in a row.* first at decoder\.final_layernorm\.weight"
        ):
            worker.train(poisoned)
        assert scores_of(worker, ordinary()) == before
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert len(said) == 3
    assert said[0].startswith("warning: optimizer step 2 skipped: gradient norm is")


def test_a_gradient_norm_that_spikes_skips_the_step_until_the_limit(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded = {**QUIET, "spike_guard": "skip", "spike_limit": 2}
    with worker_of(checkpoint, tmp_path, algorithm=UNBOUNDED, optimizer=guarded) as worker:
        for _ in range(4):
            assert worker.train(ordinary())["train/skipped_steps"] == 0
        before = scores_of(worker, ordinary())
        assert worker.train(with_rewards_times(1e4, 1))["train/skipped_steps"] == 2
        assert scores_of(worker, ordinary()) == before
        # Two in a row were skipped: the next step is taken.
        assert worker.train(with_rewards_times(1e4, 1))["train/skipped_steps"] == 1
    assert "spreads from the median" in capsys.readouterr().out


def test_a_step_between_starts_the_count_of_skipped_steps_anew(checkpoint: str, tmp_path: Path) -> None:
    poisoned = with_rewards_times(1e40, 1)
    with worker_of(checkpoint, tmp_path, algorithm=UNBOUNDED) as worker:
        for _ in range(3):
            assert worker.train(poisoned)["train/skipped_steps"] == 2
            assert worker.train(ordinary())["train/skipped_steps"] == 0


def without_samples(rollout: Rollout) -> None:
    rollout.groups = []


def with_a_reward_of_nan(rollout: Rollout) -> None:
    rollout.samples[5].reward = float("nan")


def with_an_endless_response(rollout: Rollout) -> None:
    rollout.samples[2].response_ids = [1] * 600


def without_the_engines_log_probs(rollout: Rollout) -> None:
    rollout.samples[2].log_probs = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_samples, "rollout 0 has no samples to train on"),
        (with_a_reward_of_nan, "sample 5 of group 1 has the reward nan, not a finite number"),
        (with_an_endless_response, "more than the model's 512 positions: lower --rollout-max-response-len"),
        (without_the_engines_log_probs, "need the engine's log-probs of every response token, and some are missing"),
    ],
)
def test_a_rollout_that_cannot_be_trained_on_is_refused_and_changes_nothing(
    checkpoint: str, tmp_path: Path, change: Callable[[Rollout], None], message: str
) -> None:
    rollout = ordinary()
    change(rollout)
    with worker_of(checkpoint, tmp_path, algorithm={"use_tis": True}) as worker:
        before = scores_of(worker, ordinary())
        with pytest.raises(DataError, match=message):
            worker.train(rollout)
        assert scores_of(worker, ordinary()) == before


@pytest.mark.parametrize(
    ("algorithm", "kept"),
    [
        ({}, False),
        ({"kl_loss_coef": 0.5}, False),
        ({"use_kl_loss": True}, True),
        ({"kl_coef": 0.1}, True),
        ({"use_kl_loss": True, "loss_type": "sft_loss"}, False),
    ],
)
def test_a_reference_is_kept_only_where_a_kl_needs_it(
    checkpoint: str, tmp_path: Path, algorithm: dict[str, Any], kept: bool
) -> None:
    with worker_of(checkpoint, tmp_path, algorithm=algorithm) as worker:
        assert ("perf/ref_log_probs_time" in worker.train(ordinary())) == kept


def test_the_kl_is_that_to_the_weights_of_the_start(checkpoint: str, tmp_path: Path) -> None:
    """The estimate k1 over the tokens, from the log-probs before and after, with nothing trained in between."""
    options = {"use_kl_loss": True, "kl_loss_type": "k1", "calculate_per_token_loss": True}
    steps = {"num_steps_per_rollout": 1}
    with worker_of(checkpoint, tmp_path, algorithm=options, rollout=steps, optimizer={"lr": 1e4, **QUIET}) as worker:
        start = scores_of(worker, ordinary())
        worker.train(ordinary())
        moved = scores_of(worker, ordinary())
        kl = worker.train(ordinary())["train/kl_loss"]
    masks = [sample.loss_mask for sample in ordinary().samples]
    pairs = [
        (new - old, mask)
        for a, b, m in zip(moved, start, masks, strict=True)
        for new, old, mask in zip(a, b, m, strict=True)
    ]
    expected = sum(d * mask for d, mask in pairs) / sum(mask for _, mask in pairs)
    assert abs(expected) > 1e-3
    assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_supervised_fine_tuning_raises_the_log_probs_of_its_responses(checkpoint: str, tmp_path: Path) -> None:
    rollout = ordinary()
    for sample in rollout.samples:
        # A data set has neither.
        sample.reward, sample.log_probs = None, []
    options = {"loss_type": "sft_loss", "calculate_per_token_loss": True}
    steps = {"num_steps_per_rollout": 1}
    with worker_of(checkpoint, tmp_path, algorithm=options, rollout=steps, optimizer={"lr": 1e3, **QUIET}) as worker:
        scores = scores_of(worker, rollout)
        first = worker.train(rollout)
        second = worker.train(rollout)
    values = [
        (score, mask)
        for sample, ours in zip(rollout.samples, scores, strict=True)
        for score, mask in zip(ours, sample.loss_mask, strict=True)
    ]
    expected = -sum(score * mask for score, mask in values) / sum(mask for _, mask in values)
    assert first["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert second["train/loss"] < first["train/loss"] - 0.01
    assert "train/pg_loss" not in first
