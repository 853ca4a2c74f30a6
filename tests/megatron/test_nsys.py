"""A rank under Nsight Systems itself, started as Ray starts it: its exit code, its report, its end with its supervisor.

Without a GPU nothing is marked, so that the reports are of whole processes here.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.context import RuntimeEnvContext
from ray._private.runtime_env.nsight import NsightPlugin
from ray.runtime_env import RuntimeEnv

from tests.support import patience
from tests.support.leftovers import MARK, processes_of
from tests.support.plans import plan_of
from tests.support.slurm_cluster import wait_until
from vime.recipe.load import change
from vime.run.profiles import nsys_environment

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("nsys") is None, reason="needs nsys of Nsight Systems on the path"),
]

SUPERVISED = """
import os, sys
from pathlib import Path
from vime.node.supervise import Supervisor
Supervisor(sys.argv[2:], dict(os.environ), Path(sys.argv[1]), on_report=print, report_variable="REPORTS").run()
"""


def shell_of_rank(run_dir: Path, *, marked: bool) -> str:
    """Shell line with which Ray starts rank 1 of a run that profiles it; without marks all of it is recorded."""
    plan = plan_of("tiny-qwen3", "--profile-ranks", "1", "--profile-rollouts", "3", run_dir=run_dir)
    environment = nsys_environment(change(plan.recipe, profile={"profiler": "nsys"}), str(run_dir), 1)["runtime_env"]
    if not marked:
        environment["nsight"] = {k: v for k, v in environment["nsight"].items() if not k.startswith("capture-range")}
    context, env = RuntimeEnvContext(), RuntimeEnv(**environment)
    plugin = NsightPlugin(str(run_dir / "session" / "runtime_resources"))
    asyncio.run(plugin.create(None, env, context))
    plugin.modify_context([], env, context)
    return f"exec {context.py_executable}"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with everything in its path that nsys can bear."""
    return tmp_path / "it's a run & größe $HOME"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Environment on a node, where nsys keeps what it has not reported yet in the run's own folder."""
    (tmp_path / "node").mkdir(mode=0o700)
    return {**os.environ, "TMPDIR": str(tmp_path / "node"), MARK: tmp_path.name}


def start(shell: str, program: str, environ: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", f'{shell} -c "$0"', program]
    return subprocess.run(words, env=environ, capture_output=True, text=True, timeout=patience.PROCESS, **options)


def test_a_rank_that_marks_nothing_ends_as_it_would_alone(run_dir: Path, environ: dict[str, str]):
    done = start(shell_of_rank(run_dir, marked=True), "print('trained'); raise SystemExit(7)", environ)
    assert (done.returncode, "trained" in done.stdout) == (7, True), done.stderr
    assert list((run_dir / "profiles").iterdir()) == []


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("os.kill(os.getpid(), 9)", 137)])
def test_the_report_is_named_by_rank_and_process_however_it_ends(
    run_dir: Path, environ: dict[str, str], end: str, code: int
):
    program = f"import os; print('process', os.getpid(), flush=True); {end}"
    done = start(shell_of_rank(run_dir, marked=False), program, environ)
    assert done.returncode == code, done.stdout + done.stderr
    (process,) = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("process ")]
    assert [path.name for path in (run_dir / "profiles").iterdir()] == [f"rank-001.{process}.nsys-rep"]


def test_nothing_of_it_outlives_its_supervisor(run_dir: Path, environ: dict[str, str]):
    """nsys keeps an agent and a launcher, which leave the rank's session and parent."""
    shell, log = shell_of_rank(run_dir, marked=True), run_dir / "rank.log"
    program = "import time; print('up', flush=True); time.sleep(1000)"
    words = [sys.executable, "-c", SUPERVISED, str(log), "bash", "-c", f'{shell} -c "$0"', program]
    with subprocess.Popen(words, env=environ) as supervisor:
        wait_until(lambda: log.is_file() and "up" in log.read_text(), patience.PROCESS)
        assert len(processes_of(environ[MARK])) > 3
        supervisor.send_signal(signal.SIGTERM)
        supervisor.wait(patience.PROCESS)
        assert processes_of(environ[MARK]) == {}
