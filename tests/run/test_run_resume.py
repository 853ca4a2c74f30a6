"""The command that resumes a run is the one that started it, in the run's own folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from vime import submit
from vime.planning.build import make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.folder import read_plan
from vime.run.plan import Plan
from vime.run.resume import resume_command


@pytest.fixture
def plan(base_dir: Path) -> Plan:
    return make_plan(
        load_recipe("tiny-deepseek-r1"), cluster=load_cluster("local"), base_dir=base_dir, run_name="a run", nodes=1
    )


def words(plan: Plan, *command: str) -> tuple[str, ...]:
    return resume_command(plan.model_copy(update={"command": command}))


def test_everything_but_the_place_is_as_it_was(plan: Plan):
    given = ("--recipe", "tiny-deepseek-r1", "--run-name=x", "--runs-dir", "/r", "--time", "60", "--", "--run-dir", "7")
    assert words(plan, *given) == (
        *("python", "-m", "vime.submit", "--recipe", "tiny-deepseek-r1", "--time", "60"),
        *("--run-name", "a run", "--run-dir", plan.run_dir, "--base-dir", plan.base_dir),
        *("--", "--run-dir", "7"),
    )


def test_a_plan_without_its_command_names_recipe_nodes_and_cluster(plan: Plan):
    assert resume_command(plan)[3:9] == ("--recipe", "tiny-deepseek-r1", "--nodes", "1", "--cluster", "local")


def test_the_command_makes_the_same_plan_in_the_same_folder(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    local = pytest.importorskip("vime.schedulers.local")
    monkeypatch.setattr(local, "run", lambda plan: 0)
    given = ["--recipe", "tiny-deepseek-r1", "--cluster", "local", "--base-dir", str(base_dir), "--run-name", "ü '$x"]
    assert submit.main([*given, "--", "--lr", "3e-6"]) == 0
    first = read_plan(base_dir / "runs" / "ü '$x")
    assert submit.main(list(resume_command(first)[3:])) == 0
    second = read_plan(first.run_dir)
    assert second.recipe == first.recipe
    assert (second.run_name, second.run_dir, second.base_dir) == (first.run_name, first.run_dir, first.base_dir)
    assert resume_command(second) == resume_command(first)
