"""The main job on this machine, as the README starts it: every part real, and the model learns."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.main_job import PeakMemory
from vime.observe.timeline import read_timeline
from vime.run.folder import read_plan
from vime.run.journal import last_start, read_events
from vime.run.metrics import read_metrics, series
from vime.run.resume import resume_command

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


@dataclass(frozen=True)
class Quickstart:
    """`tools/quickstart.sh`, run to its end."""

    run: Path
    lines: list[str]
    peak_bytes: int


def start_quickstart(base: Path, *words: str) -> Quickstart:
    env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}
    argv = [ROOT / "tools" / "quickstart.sh", *words]
    with subprocess.Popen(
        argv, env=env, cwd=base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        with PeakMemory(base) as peak:
            said, _ = process.communicate(timeout=patience.LEARNING)
        assert process.returncode == 0, said[-6000:]
    lines = said.splitlines()
    return Quickstart(base / "runs" / lines[-1].partition(":")[0], lines, peak.bytes)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    return start_quickstart(tmp_path_factory.mktemp("base"))


def test_the_last_line_is_the_run_its_rewards_and_its_report(quickstart):
    run, lines = quickstart.run, quickstart.lines
    said = LAST_LINE.match(lines[-1])
    assert said, lines[-1]
    assert said["run"] == run.name
    assert Path(said["report"]).read_text().startswith("<!doctype html>")


def test_the_mean_reward_of_all_finished_groups_rises_by_15_points(quickstart):
    assert_learnt(quickstart.run)


def assert_learnt(run: Path) -> None:
    rewards = [value for _, value in series(read_metrics(run), "rollout/raw_reward")]
    assert sum(rewards[-5:]) / 5 - sum(rewards[:5]) / 5 >= 0.15
    held_out = [value for _, value in series(read_metrics(run), "eval/tiny-math")]
    assert held_out[-1] > held_out[0]


def test_another_seed_learns_too(quickstart, tmp_path: Path, pytestconfig: pytest.Config):
    if not pytestconfig.getoption("--full"):
        pytest.skip("a second quickstart takes minutes: --full runs it")
    assert_learnt(start_quickstart(tmp_path, "--seed", "1").run)


def test_all_its_processes_fit_into_10_gib(quickstart):
    assert 2**30 < quickstart.peak_bytes < 10 * 2**30


def test_engine_and_trainer_agree_at_the_start_and_stay_close(quickstart):
    """At the start both hold the same numbers; then the trainer's fp32 weights are rounded to fp8 for the engine."""
    differences = [v for _, v in series(read_metrics(quickstart.run), "train/train_rollout_logprob_abs_diff")]
    assert differences[0] < 0.02
    assert max(differences) < 0.3


def test_checkpoints_are_published_with_their_tracker_and_the_oldest_are_gone(quickstart):
    plan = read_plan(quickstart.run)
    folder = Path(plan.recipe.checkpoint.save)
    last = plan.recipe.rollout.num_rollout - 1
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)
    kept = sorted(folder.glob("iter_*"))
    assert len(kept) == plan.recipe.checkpoint.save_keep
    assert kept[-1].name == f"iter_{last:07d}"


def test_tensorboard_has_the_curves(quickstart):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(quickstart.run / "tensorboard"))
    board.Reload()
    assert {"rollout/raw_reward", "train/loss", "eval/tiny-math"} <= set(board.Tags()["tensors"])


def test_the_timeline_has_every_phase_and_what_the_rank_did_and_opens_in_perfetto(quickstart):
    spans = read_timeline(quickstart.run)
    names = {track: {span.name for span in spans if span.track == track} for track in {span.track for span in spans}}
    assert names["driver"] >= {"start", "sync", "eval", "generate", "train", "save"}
    assert names["rewards"] == {"reward"}
    assert names["rank 0"] >= {"log_probs", "train", "wait"}
    trace = json.loads((quickstart.run / "trace.json").read_text())
    assert len(trace["traceEvents"]) > len(spans) / 2


def test_speed_is_logged_and_what_the_engine_does_not_count_is_not(quickstart):
    steps = read_metrics(quickstart.run)
    for name in ("perf/tokens_per_gpu_per_s", "perf/reward_time"):
        assert series(steps, name), name
    # vLLM has no prefix cache for latent attention on a processor.
    assert not series(steps, "perf/engine_cache_hit_rate")


def test_the_journal_ends_with_success_and_the_run_took_no_stage_twice(quickstart):
    events = [json.loads(line) for line in (quickstart.run / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "run-end"
    assert events[-1]["data"]["cause"] == "SUCCESS"
    started = [event["stage"] for event in events if event["kind"] == "stage-start"]
    assert started == ["preflight", "rehearsal", "cast", "convert", "ray-head", "train", "report"]


def test_nothing_is_left_running(quickstart):
    assert processes_naming(str(quickstart.run)) == []


def test_what_the_run_wrote_is_private_and_no_log_holds_a_secret(quickstart):
    run = quickstart.run
    tokens = [path.read_text().strip() for path in (run / "secrets").iterdir()]
    assert tokens
    for path in [run / "secrets", *(run / "secrets").iterdir(), *run.rglob("*.log"), run / "plan.json"]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for path in [*run.rglob("*.log"), run / "plan.json", run / "events.jsonl"]:
        text = path.read_text(errors="replace")
        assert not any(token in text for token in tokens), path


def test_the_reports_command_goes_on_after_the_last_rollout_with_the_data_cursor_it_had(quickstart):
    """One more rollout of the finished run: it starts at the saved number, and skips the stages that are done."""
    run = quickstart.run
    plan = read_plan(run)
    wanted = plan.recipe.rollout.num_rollout + 1
    before = read_metrics(run)
    env = {**os.environ, "BASE_DIR": plan.base_dir, "XDG_STATE_HOME": f"{plan.base_dir}/state"}
    command = resume_command(plan)
    assert shlex.join(command) in html.unescape((run / "report.html").read_text())
    argv = [
        str(ROOT / ".venv" / "bin" / "python"),
        *command[1:],
        "--num-rollout",
        str(wanted),
        "--eval-interval",
        "1000",
    ]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=patience.TRAINING)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    after = read_metrics(run)
    assert max(step for step, values in after.items() if "rollout/raw_reward" in values) == wanted - 1
    assert all(after[step]["rollout/raw_reward"] == before[step]["rollout/raw_reward"] for step in range(wanted - 1))
    events = last_start(read_events(run))
    assert [event.stage for event in events if event.kind == "stage-skip"] == ["cast", "convert"]
