"""Evaluations beside a run, by hand, and of a plain HF folder: real engines on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.small_base import ROOT, start_run, write_qwen3
from vime.run.evaluations import evaluation_folder, read_result
from vime.run.journal import read_events
from vime.run.metrics import read_metrics, series

pytestmark = pytest.mark.e2e

FLAGS = ("--num-rollout", "2", "--rollout-batch-size", "8", "--over-sampling-batch-size", "8")
FLAGS += ("--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none")
FLAGS += ("--conversion", "direct", "--save-interval", "1", "--n-samples-per-eval-prompt", "1")


def evaluate(base: Path, *words: str) -> str:
    env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}
    done = subprocess.run(
        [sys.executable, "-m", "vime.eval", *words],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=patience.TRAINING,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    write_qwen3(base)
    return base


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    log = base / "beside.log"
    process = start_run(base, "beside", *FLAGS, "--eval-job", log=log)
    assert process.wait(patience.LEARNING) == 0, log.read_text()[-4000:]
    return base / "runs" / "beside"


def test_every_checkpoint_is_evaluated_beside_the_run_under_its_rollouts_number(run):
    points = series(read_metrics(run), "eval/tiny-math")
    assert [step for step, _ in points] == [0, 1]
    said = [event.text for event in read_events(run) if event.kind == "evaluation"]
    assert len(said) == 2
    assert not any("left out" in text for text in said)
    for number in (0, 1):
        folder = evaluation_folder(run, number)
        assert (folder / "taken").exists()
        assert not (folder / "weights").exists()
    assert '"eval/tiny-math"' in (run / "metrics.jsonl").read_text()


def test_tensorboard_has_the_points(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Tensors("eval/tiny-math")] == [0, 1]


def test_a_checkpoint_is_evaluated_by_hand(run, base):
    evaluate(base, str(run), "--checkpoint", "1", "--", "--eval-temperature", "0")
    result = read_result(evaluation_folder(run, 1))
    assert result is not None
    assert read_metrics(run)[1]["eval/tiny-math"] == result.values["eval/tiny-math"]


def test_a_plain_hf_folder_is_evaluated(base):
    words = ["--recipe", "tiny-qwen3", "--cluster", "local", "--run-dir", str(base / "plain")]
    said = evaluate(base, str(base / "tiny-qwen3"), *words, "--", "--n-samples-per-eval-prompt", "1")
    assert "eval 0: eval/tiny-math" in said
    assert 0.0 <= read_metrics(base / "plain")[0]["eval/tiny-math"] <= 1.0
