"""A scheduler that vime has never heard of: a class named in a profile, behind the protocol of vime.run.scheduler."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, stub
from tests.support.spool_scheduler import Spool
from vime import attach, cancel, status, submit
from vime.errors import BadInput
from vime.run.journal import read_events
from vime.run.registry import record_run
from vime.run.scheduler import Scheduler, find_scheduler
from vime.run.state import run_state
from vime.schedulers.local import Local
from vime.schedulers.slurm import Slurm

ROOT = Path(__file__).parents[2]
KIND = "tests.support.spool_scheduler:Spool"
METHODS = [name for name, _ in inspect.getmembers(Scheduler, inspect.isfunction) if not name.startswith("_")]


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setenv("SPOOL", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return folder


def wait_for(run_dir: Path, state: str) -> None:
    deadline = time.monotonic() + patience.PROCESS
    while run_state(run_dir).state != state:
        assert time.monotonic() < deadline, run_state(run_dir)
        time.sleep(0.1)


@pytest.mark.parametrize("scheduler", [Slurm, Local, Spool])
@pytest.mark.parametrize("method", METHODS)
def test_a_scheduler_has_every_method_of_the_protocol(scheduler: type, method: str) -> None:
    contract = inspect.signature(getattr(Scheduler, method))
    assert list(inspect.signature(getattr(scheduler, method)).parameters) == list(contract.parameters)
    assert inspect.getdoc(getattr(Scheduler, method)), "a contract in words"


def test_a_dry_run_shows_what_the_scheduler_would_get(
    spool: Path, tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "spool.yaml"
    profile.write_text(f"kind: {KIND}\n")
    words = ["--cluster", str(profile), "--base-dir", str(base_dir), "--recipe", "tiny-deepseek-r1", "--nodes", "1"]
    assert submit.main(["--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert "partition spool chosen: 1 node" in said
    assert "Process of the job\n\n" in said
    assert "#SBATCH" not in said
    assert "srun" not in said


@pytest.mark.e2e
def test_a_run_is_queued_watched_attached_to_and_cancelled(
    spool: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (spool / "hold").touch()
    plan = make_plan(run_dir, [stub("train", "print('trains', flush=True); import time; time.sleep(3600)")], kind=KIND)
    record_run(run_dir)
    scheduler = find_scheduler(KIND)
    scheduler.check(plan)
    assert scheduler.submit(plan) == 0
    assert status.main([]) == 0
    assert ": pending, job" in capsys.readouterr().out
    (spool / "hold").unlink()
    wait_for(run_dir, "running")
    call, env = attach.attach(run_dir, 0, ["pwd"], terminal=False)
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=patience.PROCESS)
    assert done.stdout.strip() == str(run_dir)
    while not [event for event in read_events(run_dir) if event.kind == "stage-start"]:
        time.sleep(0.1)
    assert cancel.main([]) == 0
    assert "cancelled" in capsys.readouterr().out
    wait_for(run_dir, "cancelled")
    assert read_events(run_dir)[-1].data["cause"] == "CANCELLED"


def test_nothing_asks_which_scheduler_it_is() -> None:
    """`Cluster.one_machine` alone knows a kind by its name."""
    wrong = []
    for path in sorted((ROOT / "vime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Compare) else ""
            if "kind" in text and re.search("'(slurm|local)'", text):
                wrong.append(str(path.relative_to(ROOT / "vime")))
    assert wrong == ["run/plan.py"]


@pytest.mark.parametrize("kind", ["pbs", "no.such.module:Pbs", "tests.support.spool_scheduler:Missing"])
def test_a_scheduler_that_is_not_there_is_bad_input(kind: str) -> None:
    with pytest.raises(BadInput, match=f"kind is '{kind}'"):
        find_scheduler(kind)


def test_the_protocols_own_module_loads_neither_scheduler() -> None:
    code = "import vime.run.state, sys; print({'vime.launch', 'vime.schedulers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=patience.PROCESS)
    assert done.stdout.strip() == "set()"


def test_an_attached_command_sees_nothing_of_the_allocation_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """vime.attach from a shell of a debug session, which has options and GPUs of its own."""
    for name in ("SLURM_JOB_ID", "SLURM_GPUS_PER_NODE", "SLURM_CPUS_PER_GPU", "SLURM_MEM_PER_CPU", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "5")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    call, env = Slurm().attach("77", "n1", ["nvidia-smi"], run_dir="/shared/run", terminal=False)
    assert call[0] == "srun"
    assert "--jobid=77" in call
    assert {name: env[name] for name in env if name.startswith("SLURM_")} == {"SLURM_CONF": "/etc/slurm/slurm.conf"}
