"""Access of tests to the development cluster, and waits with deadlines."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support import patience
from vime.node.leftovers import OWNER
from vime.run.journal import Event, read_events
from vime.slurm import queue as slurm
from vime.system.processes import start_ticks

DEVCLUSTER = Path(__file__).parents[2] / "slurm" / "devcluster"
QUICK_TIMEOUT = 12
"""SlurmdTimeout of most tests; Slurm's own default is 300 s."""
STATE = Path(os.environ.get("VIME_DEVCLUSTER_DIR", "/run/vime-devcluster"))


@dataclass(frozen=True)
class DevCluster:
    """The cluster that is up."""

    nodes: int

    def call(self, *words: str) -> str:
        done = subprocess.run([DEVCLUSTER, *words], capture_output=True, text=True, timeout=patience.GROUP)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def enter(self, node: int) -> list[str]:
        """Words that go before a program that shall run on a node."""
        return [str(DEVCLUSTER), "exec", f"node{node + 1:02d}"]

    def on_node(self, node: int, *words: str) -> str:
        """Output of a program on a node."""
        done = subprocess.run([*self.enter(node), *words], capture_output=True, text=True, timeout=patience.PROCESS)
        return done.stdout

    def assert_nothing_is_left(self, job: str, run_dir: Path, *, but_on: int | None = None) -> None:
        """No process, listening port, node-local file or shared memory of the job on any node, `but_on` left out."""
        # Processes that name the run, those that a stage of the job started whatever they are called, and files.
        look = (
            f"ps -eww -o pid=,args= | grep -F -- {shlex.quote(str(run_dir))} | grep -v grep; "
            f"grep -lzs '^{OWNER}={job}$' /proc/[0-9]*/environ; ls -d /tmp/vime-*/{job} /dev/shm/* 2>/dev/null"
        )
        for node in set(range(self.nodes)) - {but_on}:
            left = lambda node=node: self.on_node(node, "sh", "-c", look)  # noqa: E731
            wait_until(lambda left=left: not left(), patience.NOTICE, lambda left=left: f"left on a node: {left()}")


def wait_until(condition: Callable[[], object], seconds: float, what: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what()}"
        time.sleep(0.2)


def wait_for_event(run_dir: Path, kind: str, seconds: float, *, stage: str | None = None, count: int = 1) -> Event:
    """The count-th event of this kind."""

    def found() -> list[Event]:
        events = [event for event in read_events(run_dir) if event.kind == kind]
        return [event for event in events if stage is None or event.stage == stage]

    wait_until(lambda: len(found()) >= count, seconds, lambda: f"{kind} {stage}; last {read_events(run_dir)[-1:]}")
    return found()[count - 1]


def wait_for_end(job: str, seconds: float) -> str:
    """The job's state after its end."""
    wait_until(lambda: (s := slurm.job_state(job)) and s.state not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
    state = slurm.job_state(job)
    assert state is not None
    return state.state


def running() -> dict[str, int] | None:
    """Settings of the cluster that is up (nodes, slurmd_timeout, …); None when none is."""
    try:
        known = json.loads((STATE / "cluster.json").read_text())
        pid, start = (STATE / "pids" / "slurmctld").read_text().split()
    except FileNotFoundError:
        return None
    return known if start_ticks(int(pid)) == int(start) else None


def bring_up(nodes: int, slurmd_timeout: int = QUICK_TIMEOUT) -> DevCluster:
    """The cluster with these settings; one with others goes down for it."""
    cluster, wanted = DevCluster(nodes), {"nodes": nodes, "slurmd_timeout": slurmd_timeout}
    present = running()
    if present is not None and {name: present.get(name) for name in wanted} != wanted:
        cluster.call("down")
    cluster.call("up", "--nodes", str(nodes), "--slurmd-timeout", str(slurmd_timeout))
    return cluster
