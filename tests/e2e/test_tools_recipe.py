"""The recipe tiny-tools on this machine, every part real: the model learns to call the calculator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from tests.support import patience
from vime.run.metrics import read_metrics, series

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """A finished run and how long it took from the command to its end."""

    run: Path
    seconds: float


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    base = tmp_path_factory.mktemp("base")
    env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}

    def types(*words: str) -> None:
        command = [sys.executable, *words]
        told = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=patience.LEARNING)
        assert told.returncode == 0, told.stdout[-6000:] + told.stderr[-3000:]

    types("tools/make_tiny_tools.py", "--output-dir", str(base))
    started = time.monotonic()
    submit = (
        "-m",
        "vime.submit",
        "--cluster",
        "local",
        "--recipe",
        "tiny-tools",
        "--nodes",
        "1",
        "--run-name",
        "tools",
    )
    types(*submit, "--base-dir", str(base))
    seconds = time.monotonic() - started
    types("-m", "vime.report", str(base / "runs" / "tools"))
    return Done(base / "runs" / "tools", seconds)


def test_the_reward_rises_by_a_fifth_in_under_ten_minutes(done: Done) -> None:
    rewards = [value for _, value in series(read_metrics(done.run), "rollout/raw_reward")]
    assert fmean(rewards[-3:]) - fmean(rewards[:2]) >= 0.2, rewards
    assert done.seconds < patience.TRAINING


def test_the_model_calls_more_and_what_it_is_told_is_not_trained_on(done: Done) -> None:
    metrics = read_metrics(done.run)
    calls = [value for _, value in series(metrics, "rollout/tool/calculator/calls")]
    finished = [value for _, value in series(metrics, "rollout/num_finished_groups")]
    shares = [made / (groups * 8) for made, groups in zip(calls, finished, strict=True)]
    assert fmean(shares[-3:]) > fmean(shares[:2]) + 0.2
    samples = [
        json.loads(line)
        for path in sorted((done.run / "rollouts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    called = [sample for sample in samples if len(sample["turns"]) == 3]
    assert called
    for sample in called:
        for turn in sample["turns"]:
            masks = sample["loss_mask"][turn["start"] : turn["end"]]
            assert set(masks) == {int(turn["role"] == "model")}
        right = [use for use in sample["tools"] if not use["error"]]
        assert not right or sample["turns"][1]["text"].lstrip("-").replace(".", "").isdigit()


def test_engine_and_trainer_agree_on_the_sampled_tokens(done: Done) -> None:
    differences = [value for _, value in series(read_metrics(done.run), "train/train_rollout_logprob_abs_diff")]
    assert max(differences) < 0.1


def test_the_report_shows_conversations_turn_by_turn(done: Done) -> None:
    page = (done.run / "report.html").read_text()
    assert '<ol class="turns"><li class="said"><span class="tag">model, ' in page
    assert '<li class="told"><span class="tag">tool, ' in page
