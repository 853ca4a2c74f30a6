"""vime.eval as a person, and the controller, calls it: what is evaluated, where its job runs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.plans import plan_of
from tests.support.recording_scheduler import submissions
from vime.eval import main
from vime.run.evaluations import evaluation_folder
from vime.run.folder import read_plan, write_plan
from vime.run.registry import runs


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster whose jobs are recorded and never start."""
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    path = tmp_path / "recorder.yaml"
    path.write_text(
        "kind: tests.support.recording_scheduler:Recorder\ngpu-request: none\n"
        "eval-job:\n  nodes: 1\n  time-limit-minutes: 30\n"
    )
    return path


@pytest.fixture
def run(base_dir: Path, profile: Path) -> Path:
    """A run with checkpoints 1 and 3."""
    folder = base_dir / "runs" / "trained"
    plan = plan_of("tiny-qwen3", nodes=1, base=base_dir, cluster=str(profile), run_dir=folder)
    write_plan(plan)
    for number in (1, 3):
        (folder / "checkpoints" / f"iter_{number:07d}").mkdir(parents=True)
    return folder


def test_a_checkpoint_of_a_run_becomes_a_job_in_the_runs_folder(run, capsys):
    assert main([str(run), "--checkpoint", "1", "--", "--eval-temperature", "0"]) == 0
    assert [row["run"] for row in submissions()] == ["test-eval-1"]
    plan = read_plan(evaluation_folder(run, 1))
    assert plan.evaluation is not None
    assert (plan.evaluation.run_dir, plan.evaluation.rollout_id) == (str(run), 1)
    assert [stage.name for stage in plan.stages] == ["preflight", "export", "ray-head", "evaluate"]
    assert plan.recipe.eval.eval_temperature == 0
    assert plan.cluster.time_limit_minutes == 30
    # The last run that other commands find stays the one that trains.
    assert runs() == []


def test_without_a_number_it_is_the_newest(run):
    assert main([str(run), "--time", "90"]) == 0
    plan = read_plan(evaluation_folder(run, 3))
    assert plan.cluster.time_limit_minutes == 90


def test_an_hf_folder_has_a_run_folder_of_its_own(base_dir, profile, capsys):
    words = ["--recipe", "tiny-qwen3", "--cluster", str(profile), "--base-dir", str(base_dir)]
    assert main([str(base_dir / "tiny-qwen3"), *words]) == 0
    (found,) = runs()
    plan = read_plan(found.run_dir)
    assert found.run_dir.parent == base_dir / "runs"
    assert plan.evaluation is not None
    assert plan.evaluation.run_dir is None
    assert plan.recipe.checkpoint.hf_checkpoint == str(base_dir / "tiny-qwen3")
    assert f"run {plan.run_name}" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, capsys):
    assert main([str(run), "--checkpoint", "3", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "evaluate: python -m vime.train --run" in said
    assert "tiny-math" in said
    assert submissions() == []
    assert not (run / "evaluations").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN", "--checkpoint", "2"], "--checkpoint is 2: "),
        (["RUN", "--recipe", "tiny-qwen3"], "--recipe has no meaning for a run"),
        (["HF", "--recipe", "tiny-qwen3", "--checkpoint", "1"], "--checkpoint has no meaning for an HF folder"),
        (["RUN", "--nodes", "0"], "--nodes is 0: give at least 1"),
        (["nowhere"], "no run 'nowhere'"),
        (["RUN", "--", "--eval-temperature", "-1"], "--eval-temperature is '-1'"),
        (["RUN", "--", "--eval-prompt-data", "[]"], "there is nothing to evaluate on: give --eval-prompt-data"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(run, base_dir, capsys, words, said):
    places = {"RUN": str(run), "HF": str(base_dir / "tiny-qwen3")}
    assert main([places.get(word, word) for word in words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1
    assert submissions() == []
    assert not (run / "evaluations").exists()


def test_an_evaluation_is_not_evaluated(run, capsys):
    main([str(run), "--checkpoint", "1"])
    assert main([str(evaluation_folder(run, 1))]) == 2
    assert "is an evaluation: give the run that was trained" in capsys.readouterr().err
    assert len(submissions()) == 1
