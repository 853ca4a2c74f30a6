"""A session of tests fails where it leaves processes, shared memory, files or recorded runs behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.leftovers import MARK, Found, is_ours, left, processes_of

ROOT = Path(__file__).parents[1]
LEAVES = {
    "process": "import subprocess, sys\n"
    "process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'], start_new_session=True)\n"
    "open('pid', 'w').write(str(process.pid))",
    "file": "import tempfile; open('path', 'w').write(tempfile.mkdtemp(prefix='vt-'))",
    "nothing": "pass",
}


@pytest.mark.parametrize("name", ["vt-abc", "vime-x1_y2z3", "psm_12", "sem.mp-a", "ray", "tmp12wandb-media"])
def test_files_of_vime_and_its_libraries_are_known(name: str) -> None:
    assert is_ours(name)


@pytest.mark.parametrize("name", ["vime-0", "pytest-of-me", "tmp12", "raybans", "systemd-private"])
def test_other_files_are_left_alone(name: str) -> None:
    assert not is_ours(name)


def test_each_thing_that_was_not_there_before_is_a_line() -> None:
    before, after = Found(frozenset({"/tmp/vt-1"}), "a\n"), Found(frozenset({"/tmp/vt-1", "/tmp/vt-2"}), "a\nb\n")
    assert left(before, before, []) == []
    lines = left(before, after, ["sleep 60"])
    assert lines[:2] == ["process: sleep 60", "file: /tmp/vt-2"]
    assert "XDG_STATE_HOME" in lines[2]


def test_processes_are_known_by_the_session_that_they_come_from() -> None:
    with subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: "of this test"}) as process:
        assert process.pid in processes_of("of this test")
        process.kill()
    assert processes_of("of this test") == {}


@pytest.mark.parametrize("what", LEAVES)
def test_a_session_that_leaves_something_fails(what: str, tmp_path: Path) -> None:
    """In a temporary folder of its own, so that sessions beside it make no difference."""
    (tmp_path / "tmp").mkdir()
    body = LEAVES[what].replace("\n", "\n    ")
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    {body}\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp"), patience.VARIABLE: "0.1"}
    words = ["-c", os.devnull, "-p", "tests.support.leftovers", "-p", "no:cacheprovider", "test_it.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
    )
    if (pid := tmp_path / "pid").exists():
        os.kill(int(pid.read_text()), signal.SIGKILL)
    assert "1 passed" in done.stdout
    assert done.returncode == (0 if what == "nothing" else 1), done.stdout
    assert ("left something behind" in done.stdout) == (what != "nothing")
