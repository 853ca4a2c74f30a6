"""The tiny recipe trained with an estimator and a policy loss from outside; a real run on this machine, without
engines: its rollouts are written by the test."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.small_base import start_run, write_qwen3
from vime.observe.samples import write_samples
from vime.run.metrics import read_metrics
from vime.samples import Group, Rollout, Sample, Status

pytestmark = pytest.mark.e2e

PLUGIN = """
import torch

def best_of_group(samples, options):
    values = torch.cat([(group == group.max()).double() - 0.5 for group in samples.rewards])
    print("best_of_group of", len(values), "samples", flush=True)
    return samples.spread(values)

def likelihood(terms, options):
    from vime.megatron.losses import TokenLoss
    return TokenLoss(-terms.advantages * terms.log_probs, terms.log_probs.detach() > 0)
"""


def write_rollout(folder: Path, number: int) -> None:
    draw = random.Random(number)
    groups = []
    for index in range(8):
        samples = [
            Sample(
                4 * index + one, index, "", [draw.randrange(40) for _ in range(6)],
                response_ids=(ids := [draw.randrange(40) for _ in range(draw.randint(2, 12))]),
                log_probs=[-3.5] * len(ids), reward=draw.random(), status=Status.COMPLETED,
            )
            for one in range(4)
        ]  # fmt: skip
        groups.append(Group(index, samples))
    write_samples(folder, Rollout(number, groups), everything=True)


def test_a_run_trains_with_an_estimator_and_a_loss_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_qwen3(tmp_path)
    (tmp_path / "stranger.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for number in range(2):
        write_rollout(tmp_path, number)
    log = tmp_path / "run.log"
    flags = ("--num-rollout", "2", "--rollout-batch-size", "8", "--over-sampling-batch-size", "8")
    flags += ("--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1", "--conversion", "direct")
    flags += ("--eval-interval", "none", "--load-debug-rollout-data", str(tmp_path / "rollouts"))
    flags += ("--advantage-estimator", "stranger:best_of_group", "--policy-loss-type", "stranger:likelihood")
    process = start_run(tmp_path, "plugin", *flags, log=log)
    assert process.wait(patience.TRAINING) == 0, log.read_text()[-4000:]
    run = tmp_path / "runs" / "plugin"
    said = "".join(path.read_text() for path in (run / "logs").rglob("*.log"))
    assert "best_of_group of 32 samples" in said
    metrics = read_metrics(run)
    assert metrics[0]["train/grad_norm"] > 0
    assert (
        json.loads((run / "plan.json").read_text())["recipe"]["algorithm"]["policy_loss_type"] == "stranger:likelihood"
    )
