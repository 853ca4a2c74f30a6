"""vime.submit --hold and --in as a person calls them: what is handed over, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.support.recording_scheduler import submissions
from vime.errors import BadInput
from vime.planning.cluster import parse_hold
from vime.run.control import control_folder
from vime.run.folder import read_plan
from vime.run.hold import Holding, take_request, write_holding
from vime.run.jobs import read_jobs
from vime.submit import main
from vime.system.private import private_folder


@pytest.fixture
def submit(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """vime.submit of tiny-qwen3 to a cluster whose jobs are recorded."""
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    profile = tmp_path / "recorder.yaml"
    profile.write_text("kind: tests.support.recording_scheduler:Recorder\ngpu-request: none\n")

    def call(name: str, *words: str, cluster: bool = True) -> int:
        own = ["--recipe", "tiny-qwen3", "--base-dir", str(base_dir), "--run-name", name, "--nodes", "1"]
        return main([*own, *(["--cluster", str(profile)] if cluster else []), *words])

    return call


@pytest.fixture
def holder(submit, base_dir: Path) -> Path:
    """A run whose nodes wait."""
    assert submit("first", "--hold", "4h") == 0
    run = base_dir / "runs" / "first"
    private_folder(control_folder(run))
    write_holding(run, Holding(1, time.time() + 60))
    return run


def test_the_plan_says_how_long_the_nodes_stay(holder):
    assert read_plan(holder).hold_minutes == 240


def test_another_recipe_is_handed_to_the_run_that_holds_the_nodes(submit, holder, base_dir, capsys):
    assert submit("second", "--in", "first", "--", "--lr", "0.5", cluster=False) == 0
    second = base_dir / "runs" / "second"
    assert take_request(holder) == str(second)
    plan = read_plan(second)
    assert plan.recipe.optimizer.lr == 0.5
    assert plan.cluster == read_plan(holder).cluster
    assert read_jobs(second) == read_jobs(holder)
    assert "second starts in the nodes of first" in capsys.readouterr().out
    # Nothing but the first run was queued.
    assert [row["run"] for row in submissions()] == ["first"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--in", "first", "--time", "60"], "--time with --in: the nodes are there already"),
        (["--in", "first", "--hold", "1h"], "--hold with --in"),
        (["--in", "first", "--spares", "1"], "--in runs in nodes that are there"),
        (["--in", "nowhere"], "no run 'nowhere'"),
    ],
)
def test_what_the_allocation_has_decided_is_refused(submit, holder, base_dir, capsys, words, said):
    assert submit("second", *words, cluster=False) == 2
    assert said in capsys.readouterr().err
    assert not (base_dir / "runs" / "second").exists()


def test_a_run_that_holds_nothing_now_is_named_and_nothing_is_written(submit, holder, base_dir, capsys):
    write_holding(holder, None)
    assert submit("second", "--in", "first", cluster=False) == 2
    assert "holds no nodes now" in capsys.readouterr().err
    assert not (base_dir / "runs" / "second").exists()
    submit("third")
    assert submit("second", "--in", "third", cluster=False) == 2
    assert "was submitted without --hold" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "minutes"), [("4h", 240), ("30m", 30), ("0.5h", 30), ("1:30:00", 90)])
def test_times_are_read_as_people_write_them(text, minutes):
    assert parse_hold(text) == minutes


@pytest.mark.parametrize("text", ["0h", "soon", "-1h", ""])
def test_other_times_are_refused(text):
    with pytest.raises(BadInput, match="--hold is "):
        parse_hold(text)
