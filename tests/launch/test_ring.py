"""The ring: what it measures between real processes, and whom a slow link is blamed on."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vime.launch.reports import REPORT_FD, Report
from vime.launch.ring import slow_nodes


def told(rank: int, sent: float, received: float) -> Report:
    return Report(
        rank, "result", {"host": f"node{rank + 1:02d}", "sent": sent * 1e9 / 8, "received": received * 1e9 / 8}
    )


def test_a_node_is_as_fast_as_the_better_of_its_links() -> None:
    """The third node is slow in both directions; its neighbours have one good link each."""
    ring = [told(0, 9, 9), told(1, 0.2, 9), told(2, 0.2, 0.2), told(3, 9, 0.2)]
    (problem,) = slow_nodes(ring, [10, 11, 12, 13], 1.0)
    assert problem.place == 12
    assert str(problem) == "node03: network bandwidth is 0.2 Gbit/s, needs 1 Gbit/s"
    assert list(slow_nodes(ring, [10, 11, 12, 13], 0.1)) == []


@pytest.mark.e2e
def test_processes_measure_each_other(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started = []
    for rank in range(3):
        reads, writes = os.pipe()
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        argv = [sys.executable, "-m", "vime.launch.ring", "--run", str(tmp_path)]
        process = subprocess.Popen(argv, env={**env, REPORT_FD: str(writes)}, pass_fds=(writes,))
        os.close(writes)
        started.append((process, reads))
    for process, reads in started:
        assert process.wait(120) == 0
        with os.fdopen(reads) as reports:
            kind, data = json.loads(reports.read())
        assert kind == "result"
        # Loopback brings more than 10 MB/s, also on a busy machine.
        assert min(data["sent"], data["received"]) > 1e7
