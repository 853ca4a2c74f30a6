"""A run folder or plan that others could have written is refused by everything that would act on it, in one line."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, stub
from vime import attach, cancel, logs, report, status
from vime.errors import BadInput
from vime.launch.controller import control
from vime.launch.prepare import start
from vime.node import task
from vime.run.folder import PLAN
from vime.run.plan import Plan
from vime.schedulers import local
from vime.schedulers.submission import submit_jobs


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return make_plan(tmp_path / "run", [stub("cast", "print('ran')")])


def open_folder(run_dir: Path) -> None:
    run_dir.chmod(0o775)


def open_plan(run_dir: Path) -> None:
    (run_dir / PLAN).chmod(0o666)


COMMANDS = [
    pytest.param(lambda run: status.main([run]), id="status"),
    pytest.param(lambda run: cancel.main([run]), id="cancel"),
    pytest.param(lambda run: attach.main([run]), id="attach"),
    pytest.param(lambda run: logs.main([run]), id="logs"),
    pytest.param(lambda run: report.main([run]), id="report"),
    pytest.param(lambda run: task.main(["--run", run, "--stage", "cast"]), id="task"),
]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("spoil", [open_folder, open_plan])
def test_commands_and_tasks_refuse_it(
    plan: Plan, spoil: Callable[[Path], None], command: Callable[[str], int], capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(Path(plan.run_dir))
    assert command(plan.run_dir) == 2
    said = capsys.readouterr().err
    assert "can be written by other users" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("spoil", [open_folder, open_plan])
def test_the_controller_refuses_it(plan: Plan, spoil: Callable[[Path], None]) -> None:
    spoil(Path(plan.run_dir))
    with pytest.raises(BadInput, match="can be written by other users"):
        control(plan.run_dir, local.LocalRunner)


@pytest.mark.parametrize("action", [start, submit_jobs], ids=["start", "submit"])
def test_a_submission_refuses_it_before_anything_is_queued(plan: Plan, action: Callable[[Plan], object]) -> None:
    open_folder(Path(plan.run_dir))
    with pytest.raises(BadInput, match="can be written by other users"):
        action(plan)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000])
def test_the_folder_of_a_run_is_private_whatever_the_umask(plan: Plan, tmp_path: Path, umask: int) -> None:
    run = tmp_path / "base" / "runs" / "r1"
    before = os.umask(umask)
    try:
        start(plan.model_copy(update={"run_dir": str(run)}))
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.stat().st_mode) == 0o700
    assert stat.S_IMODE((run / PLAN).stat().st_mode) == 0o600
