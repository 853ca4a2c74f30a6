"""Run folders of older versions of vime: read, shown, and resumed by submitting again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vime import status, submit
from vime.run.folder import read_plan

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run folder as vime 0.1 wrote it."""
    shutil.copy(GOLDEN / "plan-version-1.json", tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text().replace("/shared/runs/first", str(tmp_path))
    (tmp_path / "plan.json").write_text(text)
    return tmp_path


def test_a_plan_of_version_1_is_read_as_one_of_today(old_run: Path) -> None:
    plan = read_plan(old_run)
    assert (plan.version, plan.recipe.name, plan.recipe.resources.actor_num_nodes) == (2, "tiny-qwen3", 2)
    modules = {stage.name: stage.command[1] for stage in plan.stages}
    assert (modules["preflight"], modules["ray-head"]) == ("vime.node.preflight", "vime.node.ray_node")


def test_an_old_run_is_shown_and_submitted_again(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(old_run)]) == 0
    again = ["--recipe", "tiny-qwen3", "--nodes", "2", "--base-dir", "/shared/models", "--run-dir", str(old_run)]
    assert submit.main([*again, "--dry-run"]) == 0
    assert json.loads((old_run / "plan.json").read_text())["version"] == 2
    capsys.readouterr()


def test_a_plan_of_a_newer_version_is_refused_in_one_line(old_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = old_run / "plan.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    assert status.main([str(old_run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not one of this version of vime" in line
