"""A real training run on the development cluster, for faults that a stub would hide.

tiny-qwen3 with random weights on three nodes: a trainer rank on each of the first two, the engine on the third. One
run serves several tests: each starts it, resumes it, or takes it over from the test before, as needed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support import patience
from tests.support.slurm_cluster import DevCluster, wait_for_event, wait_until
from tests.support.slurm_scene import Scene, node_name
from tests.support.small_base import ROOT, write_qwen3
from vime.errors import VimeError
from vime.run.checkpoints import tracked, tracks_iteration
from vime.run.folder import read_binding
from vime.run.jobs import read_jobs
from vime.run.journal import Event, last_start
from vime.slurm import queue as slurm

NODES = 3
DRIVER_NODE, RANK_NODE, ENGINE_NODE = range(NODES)
FLAGS = (
    *("--num-rollout", "3000", "--save-interval", "1", "--eval-interval", "none", "--conversion", "direct"),
    *("--rollout-batch-size", "8", "--over-sampling-batch-size", "8", "--n-samples-per-prompt", "4"),
    *("--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none"),
    *("--no-colocate", "--rollout-num-gpus", "1", "--rollout-timeout", str(patience.GROUP)),
)


class Training(Scene):
    """One run of real training."""

    def __init__(self, cluster: DevCluster, base: Path, spares: int = 0) -> None:
        super().__init__(cluster, base / "runs" / "faults")
        self._base, self._spares = base, spares
        write_qwen3(base)

    # -- what runs --

    def saved(self) -> int:
        """Rollout of the newest checkpoint; -1 without one."""
        folder = self.run_dir / "checkpoints"
        return int(tracked(folder)) if tracks_iteration(folder) else -1

    def under_way(self) -> int:
        """Training, past its first rollout of this start; how many ends the journal has so far."""
        if not self.job or not self._lives():
            self._submit()
        self._trains()
        return self.ends_so_far()

    def ends_so_far(self) -> int:
        return sum(event.kind == "run-end" for event in self.events())

    def waits(self) -> bool:
        """Whether the job is in the queue again."""
        state = slurm.job_state(self.job)
        return state is not None and state.state == "PENDING"

    def resumes(self, before: int | None = None) -> None:
        """The run starts again and trains from its newest checkpoint, that of rollout `before`."""
        before = self.saved() if before is None else before
        self.mend()
        self.trains_from(before + 1)

    def trains_from(self, rollout_id: int) -> None:
        """The next attempt lives and trains, first on this rollout."""
        begin = time.monotonic()
        wait_until(self._lives, patience.TRAINING, lambda: slurm.call("squeue"))
        self._trains()
        log = (self.run_dir / "logs" / "train" / "node00.log").read_text(errors="replace")
        first = int(log.rpartition("first rollout ")[2].split()[0])
        assert first == rollout_id, (first, rollout_id)
        print(f"trains again from rollout {first} after {time.monotonic() - begin:.0f} s")

    def _lives(self) -> bool:
        """Whether the job runs a start that has not ended."""
        state = slurm.job_state(self.job)
        last = last_start(self.events())
        ended = any(event.kind == "run-end" for event in last)
        return state is not None and state.state == "RUNNING" and bool(last) and not ended

    def _submit(self) -> None:
        if self.job:
            wait_until(lambda: not slurm.call("squeue", "-h", "-j", self.job).strip(), patience.JOB)
        env = {**os.environ, "BASE_DIR": str(self._base), "XDG_STATE_HOME": str(self._base / "state")}
        argv = [sys.executable, "-m", "vime.submit", "--recipe", "tiny-qwen3", "--nodes", str(NODES)]
        argv += ["--spares", str(self._spares), "--time", "7-0", "--run-name", self.run_dir.name, "--", *FLAGS]
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=patience.GROUP)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        self.job = read_jobs(self.run_dir)[-1].job_id

    def _trains(self) -> None:
        """Two more checkpoints come."""
        starts = sum(event.kind == "run-start" for event in self.events())
        ends = self.ends_so_far()
        seen = self.saved()

        def on() -> bool:
            assert self.ends_so_far() == ends, self.events()[-1]
            return self._lives() and self.saved() >= seen + 2

        wait_until(on, patience.TRAINING, lambda: f"start {starts}, checkpoint {self.saved()}: {self.events()[-1:]}")

    def node_of(self, index: int) -> int:
        """Number of the cluster's node that is bound to a node of the plan."""
        host = read_binding(self.run_dir).nodes[index].host
        return next(node for node in range(self.nodes) if node_name(node) == host)

    # -- how it ends --

    def ended(
        self,
        cause: str,
        *,
        before: int,
        within_s: float,
        stage: str | None = "train",
        node: int | None = None,
        rank: int | None = None,
        text: str = "",
        requeued: bool = True,
    ) -> Event:
        """The next last word after `before` others comes in time and is right."""
        begin = time.monotonic()
        end = wait_for_event(self.run_dir, "run-end", within_s, count=before + 1)
        print(f"{end.data['cause']} on {end.node} after {time.monotonic() - begin:.1f} s: {end.text}")
        told = (end.data["cause"], end.stage, end.node, end.data["requeued"])
        assert told == (cause, stage, None if node is None else node_name(node), requeued), end
        assert rank is None or end.rank == rank, end
        assert text in end.text
        return end

    def nothing_is_left(self, *, but_on: int | None = None) -> None:
        self.cluster.assert_nothing_is_left(self.job, self.run_dir, but_on=but_on)

    def pids(self, node: int, *words: str) -> list[str]:
        """Processes on a node whose command line holds all of these words."""
        lines = self.processes(node)
        return [line.split()[0] for line in lines if all(word in line for word in words) and "nsenter" not in line]

    def signal(self, node: int, number: str, *words: str) -> None:
        pids = self.pids(node, *words)
        assert pids, f"no {words} on {node_name(node)}: {self.processes(node)}"
        self.on_node(node, "kill", f"-{number}", *pids)

    def rank_process(self, node: int) -> str:
        """Process of the rank on a node. Ray titles it by the call that it runs, else by its class."""
        lines = self.processes(node)
        found = [line.split()[0] for line in lines if "ray::worker " in line or "ray::RankActor" in line]
        assert len(found) == 1, (found, lines)
        return found[0]

    def close(self) -> None:
        self.mend()
        if self.job:
            with contextlib.suppress(VimeError):
                slurm.cancel(self.job)
            wait_until(lambda: not slurm.call("squeue", "-h", "-j", self.job).strip(), patience.JOB)
