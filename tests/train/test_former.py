"""Ranks of an earlier driver are over before new ones take anything, and its engines are as new."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from vime.system.processes import find_process, started_at
from vime.train.former import end_former, former_ranks, settle

SLEEP = [sys.executable, "-c", "import time; time.sleep(3600)"]
HERE = "10.0.0.1"


def actor(name: str, job: str, pid: int = 7, *, start: int = 5000, end: int = 0) -> dict[str, Any]:
    return {
        "Name": name, "JobID": job, "Pid": pid, "StartTime": start, "EndTime": end,
        "Address": {"IPAddress": HERE, "Port": 0, "NodeID": ""},
    }  # fmt: skip


def test_ranks_of_other_jobs_are_those_of_earlier_drivers() -> None:
    actors = [
        actor("rank-0", "01", 11, end=9000),
        actor("rank-1", "01", 12),
        actor("rank-0", "02", 13),
        actor("engine-0-0", "01", 14),
        actor("rank-2", "01", 0),
        actor("", "01", 15),
    ]
    assert former_ranks(actors, "02") == ((HERE, 11, 9.0), (HERE, 12, 5.0))


def test_a_stopped_rank_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vime.train.former.GRACE_SECONDS", 0.2)
    with subprocess.Popen(SLEEP) as child:
        os.kill(child.pid, signal.SIGSTOP)
        end_former([(HERE, child.pid, time.time() + 1)], HERE)
        assert find_process(child.pid) is None


def test_a_rank_that_ends_by_itself_is_waited_for() -> None:
    with subprocess.Popen(SLEEP) as child:
        threading.Timer(0.5, child.terminate).start()
        end_former([(HERE, child.pid, time.time() + 1)], HERE)
        assert child.wait() == -signal.SIGTERM


def test_a_process_of_another_node_or_with_the_number_of_an_old_one_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vime.train.former.GRACE_SECONDS", 0.0)
    with subprocess.Popen(SLEEP) as child:
        began = started_at(child.pid)
        assert began is not None
        assert abs(began - time.time()) < 5
        end_former([("10.0.0.2", child.pid, began + 1), (HERE, child.pid, began - 1)], HERE)
        assert find_process(child.pid) is not None
        child.kill()


class Engine:
    """A client that records its calls; real engines are found in test_slurm_recovery.py."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def wake_up(self) -> None:
        self.calls.append("wake_up")

    async def pause(self, mode: str) -> None:
        self.calls.append(f"pause {mode}")

    async def init_weight_transfer(self, info: dict[str, Any]) -> None:
        self.calls.append(f"join {info['groups']}")

    async def resume(self) -> None:
        self.calls.append("resume")


@pytest.mark.parametrize(
    ("sleeps", "learns", "calls"),
    [
        pytest.param(True, True, ["wake_up", "pause abort", "join []", "resume"], id="colocated"),
        pytest.param(False, True, ["pause abort", "join []", "resume"], id="separated"),
        pytest.param(False, False, ["pause abort", "resume"], id="teacher"),
    ],
)
def test_an_engine_that_was_found_is_as_one_that_has_just_started(sleeps: bool, learns: bool, calls: list[str]) -> None:
    engine: Any = Engine()
    asyncio.run(settle(engine, sleeps=sleeps, learns=learns))
    assert engine.calls == calls
