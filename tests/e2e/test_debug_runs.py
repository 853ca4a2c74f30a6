"""Rollout only, then training only on what it wrote; both real runs on this machine."""

from __future__ import annotations

import pytest

from tests.support import patience
from tests.support.small_base import start_run, write_qwen3
from vime.observe.samples import read_rollout
from vime.run.metrics import read_metrics

pytestmark = pytest.mark.e2e

FLAGS = ("--num-rollout", "2", "--rollout-batch-size", "8", "--over-sampling-batch-size", "8")
FLAGS += ("--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none")
FLAGS += ("--conversion", "direct", "--eval-interval", "none")


def test_a_rollout_without_a_trainer_is_trained_on_without_engines(tmp_path):
    write_qwen3(tmp_path)

    def run(name, *flags):
        log = tmp_path / f"{name}.log"
        process = start_run(tmp_path, name, *FLAGS, *flags, log=log)
        assert process.wait(patience.TRAINING) == 0, log.read_text()[-4000:]
        return tmp_path / "runs" / name

    made = run("made", "--debug-rollout-only")
    rollouts = [read_rollout(made / "rollouts", number) for number in range(2)]
    assert [len(rollout.groups) for rollout in rollouts] == [8, 8]
    assert not list((made / "logs").glob("**/checkpoints"))
    assert "train/loss" not in read_metrics(made)[0]

    trained = run("trained", "--load-debug-rollout-data", str(made / "rollouts"))
    assert not (trained / "logs" / "engines").exists()
    assert list((trained / "checkpoints").glob("iter_*"))
    for number in range(2):
        # The engine's weights were those that training starts with.
        difference = read_metrics(trained)[number]["train/train_rollout_logprob_abs_diff"]
        assert difference < 0.1
