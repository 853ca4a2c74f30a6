"""The recipe tiny-tools on this machine, every part real: the model learns to call the calculator."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest

from tests.support import patience
from tests.support.person import Person
from vime.run.metrics import read_metrics, series

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Done:
    """A finished run and how long it took from the command to its end."""

    run: Path
    seconds: float


@pytest.fixture(scope="module")
def done(tools_base: Path) -> Done:
    person, run = Person(tools_base), tools_base / "runs" / "tools"
    options = ("--cluster", "local", "--recipe", "tiny-tools", "--nodes", "1", "--run-name", run.name)
    started = time.monotonic()
    person.types("-m", "vime.submit", *options, seconds=patience.LEARNING)
    seconds = time.monotonic() - started
    person.types("-m", "vime.report", str(run))
    return Done(run, seconds)


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
