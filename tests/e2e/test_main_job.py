"""The main job on this machine, as the README starts it: every part real, and the model learns."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from vime.observe.metrics import read_metrics, series
from vime.planning.io import read_plan

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
LAST_LINE = re.compile(
    r"^(?P<run>\S+): mean reward (?P<first>[\d.]+) \(first 5 .*\) -> (?P<last>[\d.]+) .*; report (?P<report>\S+)$"
)


def processes_naming(text: str) -> list[str]:
    """Command lines on this machine that hold a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in words:
            found.append(words)
    return found


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """`tools/quickstart.sh` to its end: the run folder and everything it printed."""
    base = tmp_path_factory.mktemp("base")
    env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}
    done = subprocess.run(
        [ROOT / "tools" / "quickstart.sh"], env=env, cwd=base, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (run,) = (base / "runs").iterdir()
    return run, done.stdout.splitlines()


def test_the_last_line_is_the_run_its_rewards_and_its_report(quickstart):
    run, lines = quickstart
    said = LAST_LINE.match(lines[-1])
    assert said, lines[-1]
    assert said["run"] == run.name
    assert Path(said["report"]).read_text().startswith("<!doctype html>")


def test_the_mean_reward_of_all_finished_groups_rises_by_15_points(quickstart):
    rewards = [value for _, value in series(read_metrics(quickstart[0]), "rollout/raw_reward")]
    assert sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 >= 0.15


def test_the_held_out_evaluation_ends_above_its_first_value(quickstart):
    values = [value for _, value in series(read_metrics(quickstart[0]), "eval/tiny-math")]
    assert values[-1] > values[0]


def test_engine_and_trainer_agree_at_the_start_and_stay_close(quickstart):
    """At the start both hold the same numbers; then the trainer's fp32 weights are rounded to fp8 for the engine."""
    differences = [v for _, v in series(read_metrics(quickstart[0]), "train/train_rollout_logprob_abs_diff")]
    assert differences[0] < 0.02
    assert max(differences) < 0.3


def test_checkpoints_are_published_with_their_tracker_and_the_oldest_are_gone(quickstart):
    plan = read_plan(quickstart[0])
    folder = Path(plan.recipe.checkpoint.save)
    last = plan.recipe.rollout.num_rollout - 1
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)
    kept = sorted(folder.glob("iter_*"))
    assert len(kept) == plan.recipe.checkpoint.save_keep
    assert kept[-1].name == f"iter_{last:07d}"


def test_tensorboard_has_the_curves(quickstart):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(quickstart[0] / "tensorboard"))
    board.Reload()
    assert {"rollout/raw_reward", "train/loss", "eval/tiny-math"} <= set(board.Tags()["tensors"])


def test_the_journal_ends_with_success_and_the_run_took_no_stage_twice(quickstart):
    events = [json.loads(line) for line in (quickstart[0] / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "run-end"
    assert events[-1]["data"]["cause"] == "SUCCESS"
    started = [event["stage"] for event in events if event["kind"] == "stage-start"]
    assert started == ["preflight", "cast", "convert", "ray-head", "train", "report"]


def test_nothing_is_left_running(quickstart):
    assert processes_naming(str(quickstart[0])) == []


def test_what_the_run_wrote_is_private_and_no_log_holds_a_secret(quickstart):
    run = quickstart[0]
    tokens = [path.read_text().strip() for path in (run / "secrets").iterdir()]
    assert tokens
    for path in [run / "secrets", *(run / "secrets").iterdir(), *run.rglob("*.log"), run / "plan.json"]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for path in [*run.rglob("*.log"), run / "plan.json", run / "events.jsonl"]:
        text = path.read_text(errors="replace")
        assert not any(token in text for token in tokens), path


def test_a_resubmitted_run_goes_on_after_its_last_rollout_with_the_data_cursor_it_had(quickstart):
    """One more rollout of the finished run: it starts at the saved number, and skips the stages that are done."""
    run, _ = quickstart
    plan = read_plan(run)
    wanted = plan.recipe.rollout.num_rollout + 1
    env = {**os.environ, "BASE_DIR": plan.base_dir, "XDG_STATE_HOME": f"{plan.base_dir}/state"}
    command = ["-m", "vime.submit", "--cluster", "local", "--recipe", "tiny-deepseek-r1", "--nodes", "1"]
    flags = ["--num-rollout", str(wanted), "--load", str(run / "checkpoints"), "--eval-interval", "1000"]
    python = str(ROOT / ".venv" / "bin" / "python")
    done = subprocess.run(
        [python, *command, "--run-name", "resumed", "--base-dir", plan.base_dir, "--", *flags],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    resumed = Path(plan.base_dir) / "runs" / "resumed"
    assert list(read_metrics(resumed)) == [wanted - 1]
    events = [json.loads(line) for line in (resumed / "events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event["kind"] == "stage-skip"] == ["cast", "convert"]
