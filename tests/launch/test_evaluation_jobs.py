"""The controller submits what training exports, and training neither waits nor fails for it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.launch_stub import stub
from tests.support.plans import plan_of
from tests.support.recording_scheduler import submissions
from vime.errors import Cause
from vime.launch.controller import Controller
from vime.run.evaluations import evaluation_folder
from vime.run.folder import read_plan, write_plan
from vime.run.journal import read_events
from vime.schedulers.runner_local import LocalRunner
from vime.system.processes import descendants


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    path = tmp_path / "recorder.yaml"
    path.write_text("kind: tests.support.recording_scheduler:Recorder\ngpu-request: none\n")
    return path


def run_of(base: Path, profile: Path, *asked: str) -> tuple[Path, Cause]:
    """A run whose training reports these, run to its end."""
    folder = base / "runs" / "trained"
    plan = plan_of("tiny-qwen3", nodes=1, base=base, cluster=str(profile), run_dir=folder)
    code = "\n".join(["from vime.run.messages import report", *asked, "report('result')"])
    plan = plan.model_copy(update={"stages": (stub("train", code, tells_end=True), stub("report", ""))})
    write_plan(plan)
    return folder, Controller(plan, LocalRunner(plan), say=lambda _: None).run()


def told(run: Path) -> list[str]:
    return [event.text for event in read_events(run) if event.kind == "evaluation"]


def test_every_export_is_submitted_and_journaled(base_dir, profile):
    weights = json.dumps(str(base_dir / "tiny-qwen3"))
    asked = [f"report('evaluate', rollout_id={number}, weights={weights})" for number in (1, 3)]
    run, cause = run_of(base_dir, profile, *asked)
    assert cause is Cause.SUCCESS
    assert [row["run"] for row in submissions()] == ["test-eval-1", "test-eval-3"]
    assert len(told(run)) == 2
    assert told(run)[0].startswith("rollout 1: ")
    plan = read_plan(evaluation_folder(run, 3))
    assert plan.evaluation is not None
    assert plan.evaluation.weights == str(base_dir / "tiny-qwen3")
    kinds = [(event.kind, event.stage) for event in read_events(run)]
    assert kinds.index(("evaluation", None)) < kinds.index(("stage-start", "report"))


def test_a_submission_that_is_refused_leaves_the_point_out_and_says_so(base_dir, profile):
    run, cause = run_of(base_dir, profile, "report('evaluate', rollout_id=1, weights='/nowhere')")
    assert cause is Cause.SUCCESS
    (text,) = told(run)
    assert text.startswith("rollout 1 is left out: error: --checkpoint is 1: ")
    assert submissions() == []


def test_an_export_that_failed_is_journaled(base_dir, profile):
    run, cause = run_of(base_dir, profile, "report('evaluate', rollout_id=1, left_out='the disk is full')")
    assert cause is Cause.SUCCESS
    assert told(run) == ["rollout 1 is left out: the disk is full"]


def test_a_run_that_fails_ends_what_it_was_submitting(base_dir, profile, monkeypatch):
    monkeypatch.setattr("vime.launch.evaluations.COMMAND", ("/bin/sh", "-c", "sleep 600"))
    asked = [
        "report('evaluate', rollout_id=1, weights='/nowhere')",
        "import time; time.sleep(2)",
        "raise SystemExit(1)",
    ]
    before = descendants(os.getpid())
    run, cause = run_of(base_dir, profile, *asked)
    assert cause is not Cause.SUCCESS
    assert told(run) == ["rollout 1 is left out: the run ended first"]
    assert set(descendants(os.getpid())) <= set(before)
