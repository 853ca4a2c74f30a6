"""The ring: what it measures between real processes, and whom a slow link is blamed on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from vime.node.checks import slow_nodes
from vime.run.messages import REPORT_FD, Report


def slow(*received_gbit: float, floor: float = 1.0) -> list[int]:
    """Places that are refused in a ring where each rank received so fast from the one before."""
    ring = [
        Report(rank, "result", {"host": f"node{rank + 1:02d}", "received": speed * 1e9 / 8})
        for rank, speed in enumerate(received_gbit)
    ]
    return [problem.place for problem in slow_nodes(ring, [10, 11, 12, 13], floor)]


def test_a_node_with_two_slow_links_is_the_slow_one() -> None:
    assert slow(9, 9, 0.2, 0.2) == [12]
    assert slow(0.2, 9, 9, 0.2) == [13]
    assert slow(0.2, 0.2) == [10, 11]


def test_one_slow_link_is_its_senders() -> None:
    assert slow(9, 9, 0.2, 9) == [11]
    assert slow(9, 0.2) == [10]


def test_neighbours_may_both_be_slow() -> None:
    assert slow(9, 0.2, 0.2, 0.2) == [11, 12]


def test_the_floor_decides_and_node_value_and_need_are_named() -> None:
    assert slow(9, 9, 0.2, 0.2, floor=0.1) == []
    speeds = {"node01": 2.5e7, "node02": 1e9}
    reports = [Report(i, "result", {"host": host, "received": speed}) for i, (host, speed) in enumerate(speeds.items())]
    (problem,) = slow_nodes(reports, [0, 1], 1.0)
    assert str(problem) == "node02: network bandwidth is 0.2 Gbit/s, needs 1 Gbit/s"


@pytest.mark.e2e
def test_processes_measure_each_other(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started = []
    for rank in range(3):
        reads, writes = os.pipe()
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        argv = [sys.executable, "-m", "vime.node.ring", "--run", str(tmp_path)]
        process = subprocess.Popen(argv, env={**env, REPORT_FD: str(writes)}, pass_fds=(writes,))
        os.close(writes)
        started.append((process, reads))
    for process, reads in started:
        assert process.wait(patience.PROCESS) == 0
        with os.fdopen(reads) as reports:
            kind, data = json.loads(reports.read())
        assert kind == "result"
        # Loopback brings more than 10 MB/s, also on a busy machine.
        assert data["received"] > 1e7
