"""Faults of machines that a long run meets, as real as one machine allows: full node-local disks, quotas, clocks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, stub
from vime.errors import Cause
from vime.megatron.spans import SpanRecorder
from vime.observe.timeline import Timeline, read_timeline
from vime.run.journal import read_events
from vime.run.logs import Line, LogFile, merge

ROOT = Path(__file__).parents[1]
CONTROL = "from vime.launch.controller import control; from vime.schedulers.runner_local import LocalRunner; "
CONTROL += "import sys; sys.exit(control(sys.argv[1], LocalRunner))"


def _may_mount() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _may_mount(), reason="needs a mount namespace of its own")
@pytest.mark.parametrize(
    ("size", "code"),
    [
        ("size=4m", "import os, pathlib; pathlib.Path(os.environ['TMPDIR'], 'cache').write_bytes(bytes(8 << 20))"),
        ("size=1m,nr_inodes=2", "pass"),
    ],
    ids=["filled-by-a-stage", "without-room-for-the-job-s-folder"],
)
def test_a_full_node_local_folder_ends_as_storage(size: str, code: str, tmp_path: Path) -> None:
    """A real file system of a few MB, in a namespace that only this run sees."""
    run_dir, small = tmp_path / "run", tmp_path / "node-local"
    small.mkdir()
    make_plan(run_dir, [stub("cast", code)])
    mount = f"mount -t tmpfs -o {size},mode=700 tmpfs {small} && exec \"$0\" -c '{CONTROL}' {run_dir}"
    env = {**os.environ, "VIME_NODE_TMP": str(small), "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=patience.GROUP,
    )
    end = read_events(run_dir)[-1]
    assert (end.kind, end.data["cause"]) == ("run-end", "STORAGE"), (done.stdout[-2000:], done.stderr[-2000:])
    assert done.returncode == Cause.STORAGE
    assert "No space left on device" in end.text


def test_a_quota_that_is_used_up_ends_as_storage(tmp_path: Path) -> None:
    """The kernel's error, raised by the stage itself: a fake, since no file system with quotas can be mounted here."""
    run_dir = tmp_path / "run"
    make_plan(run_dir, [stub("cast", "import errno, os; raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))")])
    env = {**os.environ, "VIME_NODE_TMP": str(tmp_path / "tmp"), "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [sys.executable, "-c", CONTROL, str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=patience.GROUP)
    assert done.returncode == Cause.STORAGE, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Disk quota exceeded" in read_events(run_dir)[-1].text


# -- clocks: the wall clock is faked, since setting the machine's would hit everybody --


@pytest.fixture(params=[-3600.0, 3600.0], ids=["back", "ahead"])
def jump(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """The second and every later look at the wall clock is an hour off."""
    real, looks = time.time, []

    def jumping() -> float:
        looks.append(1)
        return real() + (request.param if len(looks) > 1 else 0.0)

    monkeypatch.setattr(time, "time", jumping)
    return request.param


def test_a_phase_lasts_as_long_as_it_lasts(jump: float, tmp_path: Path) -> None:
    timeline = Timeline(tmp_path)
    with timeline.phase("train", 0):
        time.sleep(0.05)
    timeline.close()
    (span,) = read_timeline(tmp_path)
    assert 0.05 <= span.seconds < 10
    assert 0.05 <= timeline.take_metrics()["perf/train_time"] < 10


def test_so_does_a_rank_s_span(jump: float) -> None:
    recorder = SpanRecorder()
    with recorder.span("train"):
        time.sleep(0.05)
    assert 0.05 <= recorder.seconds()["train"] < 10


def test_a_log_whose_clock_was_set_back_keeps_its_order() -> None:
    one, other = (LogFile("train", node, None, Path(f"node{node}.log")) for node in range(2))
    first = [Line(f"2026-01-31 {stamp}", one, str(number)) for number, stamp in enumerate(("12:00", "11:00", "12:30"))]
    second = [Line("2026-01-31 12:10", other, "between")]
    assert [line.text for line in merge([*first, *second])] == ["0", "1", "between", "2"]
