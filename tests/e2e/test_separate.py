"""Trainer and engine on slots of their own: generation is one rollout ahead of training, and never more."""

from __future__ import annotations

import json

import pytest

from tests.small_base import start_run, write_qwen3
from vime.observe.metrics import read_metrics
from vime.observe.timeline import read_timeline

pytestmark = pytest.mark.e2e

ROLLOUTS = 4
FLAGS = ("--no-colocate", "--rollout-num-gpus", "1", "--num-rollout", str(ROLLOUTS), "--rollout-batch-size", "32")
FLAGS += ("--over-sampling-batch-size", "32", "--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1")
FLAGS += ("--dynamic-sampling-filter-path", "none", "--conversion", "direct", "--eval-interval", "none")
FLAGS += ("--save-debug-rollout-data", "--rollout-max-response-len", "48", "--check-weight-sync", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    write_qwen3(base)
    log = base / "submit.log"
    process = start_run(base, "apart", *FLAGS, nodes=2, log=log)
    assert process.wait(500) == 0, log.read_text()[-4000:]
    return base / "runs" / "apart"


def test_tokens_are_one_version_behind_the_trainer_from_the_second_rollout_on(run):
    for rollout in range(ROLLOUTS):
        lines = (run / "rollouts" / f"{rollout:06d}.jsonl").read_text().splitlines()
        versions = {version for line in lines for version in json.loads(line)["weight_versions"]}
        assert versions == {max(0, rollout - 1)}
        assert read_metrics(run)[rollout]["rollout/staleness_max"] == min(1, rollout)


def test_the_next_rollout_is_generated_while_one_is_trained_on(run):
    spans = {(span.name, span.rollout_id): span for span in read_timeline(run)}
    for rollout in range(ROLLOUTS - 1):
        trained, ahead = spans["train", rollout], spans["generate", rollout + 1]
        assert ahead.start < trained.end
        assert trained.start < ahead.end


def test_no_gpu_changes_hands(run):
    metrics = read_metrics(run)
    assert not [name for values in metrics.values() for name in values if name.startswith("handover/")]
    assert all(values["sync/train_rollout_logprob_abs_diff"] < 0.1 for values in metrics.values())
