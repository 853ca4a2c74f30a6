"""Losses and learning rates that cannot learn are refused before the queue."""

from __future__ import annotations

import pytest

from tests.support.plans import plan_of
from vime.errors import BadInput


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--use-kl-loss", "--kl-loss-type", "k1", "--kl-loss-coef", "0.1"], "--kl-loss-type k1 cannot be trained on"),
        (["--lr", "1e-6", "--min-lr", "1"], r"--min-lr 1\.0 is above --lr 1e-06"),
        (
            ["--lr-decay-style", "linear", "--lr-warmup-iters", "9", "--lr-decay-iters", "9"],
            "--lr-warmup-iters 9 leaves no step to decay in: the decay ends at optimizer step 9",
        ),
        (["--use-rollout-logprobs", "--use-tis"], "--use-rollout-logprobs leaves tis of --mismatch-correction nothing"),
        (["--constant-loss-length", "9", "--calculate-per-token-loss"], "reduce the loss in two ways"),
        (["--overlong-buffer-len", "0"], "--overlong-buffer-len is 0: give 1 to"),
        (["--tis-clip", "0.5", "--tis-clip-low", "1"], r"--tis-clip-low 1\.0 is above --tis-clip 0\.5"),
    ],
)
def test_a_loss_or_rate_that_cannot_learn_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        plan_of("tiny-qwen3", *flags)


def test_k1_may_be_measured() -> None:
    algorithm = plan_of("tiny-qwen3", "--use-kl-loss", "--kl-loss-type", "k1", "--kl-loss-coef", "0").recipe.algorithm
    assert "reference" in algorithm.needed_columns
