"""vime.runs: the list of runs, and what --prune removes of their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, stub
from vime import runs
from vime.run.folder import write_plan
from vime.run.journal import Journal
from vime.run.registry import record_run


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def make_run(run_dir: Path, cause: str | None, *, save: Path | None = None, tracker: str | None = "30") -> Path:
    """A recorded run with checkpoints 10, 20 and 30, one that was cut short and one that the tracker does not count."""
    plan = make_plan(run_dir, [stub("train", "")])
    if save is not None:
        checkpoint = plan.recipe.checkpoint.model_copy(update={"save": str(save), "load": str(save)})
        plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"checkpoint": checkpoint})})
        write_plan(plan)
    folder = save or run_dir / "checkpoints"
    for name in ("iter_0000010", "iter_0000020", "iter_0000030", ".iter_0000040.partial", "iter_0000050", "notes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "weights").write_bytes(bytes(1000))
    if tracker is not None:
        (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    journal = Journal(run_dir)
    journal.write("run-start", data={"restart": 0})
    if cause is not None:
        journal.write("run-end", "its end", data={"cause": cause})
    journal.close()
    record_run(run_dir)
    return folder


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


ALL = [".iter_0000040.partial", "iter_0000010", "iter_0000020", "iter_0000030", "iter_0000050", "notes"]


def test_runs_are_listed_with_their_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a run", "SUCCESS")
    make_run(tmp_path / "größe", "CODE_ERROR")
    assert runs.main([]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "job", "submitted", "rollouts", "reward", "folder"]
    assert first.startswith("a run  succeeded")
    assert "größe  failed" in second
    assert runs.main(["--json", "größe"]) == 0
    (seen,) = json.loads(capsys.readouterr().out)
    assert (seen["run"], seen["state"], seen["cause"]) == ("größe", "failed", "CODE_ERROR")


def test_nothing_goes_until_it_is_confirmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "done", "SUCCESS")
    assert runs.main(["--prune"]) == 0
    said = capsys.readouterr().out
    assert "3000 B could be removed: --yes removes it" in said
    assert left(folder) == ALL
    assert runs.main(["--prune", "--yes"]) == 0
    assert "3000 B removed" in capsys.readouterr().out
    # What the tracker names stays; so does what it does not count, and what is no checkpoint.
    assert left(folder) == ["iter_0000030", "iter_0000050", "notes"]
    assert runs.main(["--prune"]) == 0
    assert capsys.readouterr().out == "nothing to remove\n"


def test_as_many_as_asked_for_stay(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "done", "SUCCESS")
    assert runs.main(["--prune", "--keep", "2", "--yes"]) == 0
    assert left(folder) == ["iter_0000020", "iter_0000030", "iter_0000050", "notes"]


@pytest.mark.parametrize("tracker", [None, "release", "25", ""])
def test_without_a_tracker_that_names_a_checkpoint_nothing_goes(tmp_path: Path, tracker: str | None) -> None:
    folder = make_run(tmp_path / "done", "SUCCESS", tracker=tracker)
    assert runs.main(["--prune", "--yes"]) == 0
    assert left(folder) == ALL


def test_a_run_that_has_not_ended_keeps_all_it_saves_to(tmp_path: Path) -> None:
    """Also where a run that has ended used the same folder; a run whose controller is lost may still go on."""
    shared = tmp_path / "shared"
    make_run(tmp_path / "ended", "SUCCESS", save=shared)
    make_run(tmp_path / "lost", None, save=shared)
    assert runs.main(["--prune", "--yes", "ended"]) == 0
    assert left(shared) == ALL


def test_only_the_named_runs_are_pruned(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one", "SUCCESS"), make_run(tmp_path / "other", "SUCCESS")
    assert runs.main(["--prune", "--yes", "one"]) == 0
    assert left(other) == ALL
    assert left(one) != ALL


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-run"], "no run 'no-such-run'"),
        (["--keep", "0"], "--keep is 0: give at least 1"),
        (["--yes"], "--yes works only with --prune"),
    ],
)
def test_bad_input_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_cannot_be_read_is_noted_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good", "SUCCESS")
    make_run(tmp_path / "bad", "SUCCESS")
    (tmp_path / "bad" / "plan.json").write_text("{}")
    assert runs.main([]) == 0
    said = capsys.readouterr()
    assert "good" in said.out
    assert "is not one of this version of vime" in said.err
