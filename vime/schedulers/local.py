"""Runs a plan on this machine: the controller in this process, the stages as its children."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput, Cause
from vime.launch.controller import Controller, control, tell
from vime.launch.hold import Hold, keeps
from vime.launch.witness import witnessed
from vime.planning.cluster import machine_memory
from vime.run.jobs import forget_jobs
from vime.run.logs import Follower, find_logs
from vime.run.plan import Cluster, Plan
from vime.run.scheduler import PATIENCE_S, JobState, OwnJob, Preview, Wanted
from vime.schedulers.runner_local import LocalRunner

# Lines of training shown at the terminal; the log has all.
_TOLD = re.compile(r"^(rollout|eval|weights from|checkpoint|error:)")


class Local:
    """This machine as a scheduler without a queue. See vime.run.scheduler.Scheduler for the contract of each method."""

    copies_code = False

    def resolve(self, cluster: Cluster, wanted: Wanted, *, timeout_s: float) -> tuple[Cluster, list[str]]:
        if wanted.partition or wanted.spares or wanted.shape != "allocation":
            raise BadInput("--partition, --spares and --shape have no meaning with --cluster local: leave them out")
        memory = cluster.memory_per_node_bytes or machine_memory()
        cores = cluster.cpus_per_node or len(os.sched_getaffinity(0))
        return cluster.model_copy(update={"memory_per_node_bytes": memory, "cpus_per_node": cores}), []

    def preview(self, plan: Plan) -> list[Preview]:
        return []

    def write_scripts(self, plan: Plan) -> list[Path]:
        return []

    def check(self, plan: Plan) -> None:
        if len(plan.nodes) > 1:
            raise BadInput(
                f"--nodes is {len(plan.nodes)}, but with --cluster local this machine is the only node: give --nodes "
                "1, or try several nodes on one machine with slurm/devcluster (docs/clusters.md)"
            )

    def submit(self, plan: Plan) -> int:
        forget_jobs(plan.run_dir)
        return run(plan)

    def after(self, plan: Plan, job_ids: Sequence[str]) -> Plan:
        # `submit` returns when the run has ended, so runs are ordered anyway.
        return plan

    def job(self, job_id: str, *, timeout_s: float = PATIENCE_S) -> JobState | None:
        return None

    def cancel(self, job_id: str) -> None:
        """Nothing to cancel: there is no queue."""

    def hosts(self, job_id: str) -> tuple[str, ...]:
        raise BadInput(f"job {job_id} is in no queue of this machine")

    def attach(
        self, job_id: str, host: str, command: Sequence[str], *, run_dir: str, terminal: bool
    ) -> tuple[list[str], dict[str, str]]:
        raise BadInput("a run on one machine has no allocation to attach to: open a shell there")

    def own_job(self) -> OwnJob | None:
        return None

    def control(self, run_dir: str, *, link: str | None = None) -> Cause:
        return control(run_dir, LocalRunner, link=link)


def run(plan: Plan) -> int:
    """Run to the end; return the exit code. Prints every event, and training's own summary lines."""
    progress = _Progress(plan.run_dir, "evaluate" if plan.evaluation else "train")
    runner = LocalRunner(plan)
    with witnessed(plan.run_dir):
        cause = Controller(plan, runner, say=tell, watching=progress.tell).run()
    progress.tell()
    if keeps(plan, cause):
        Hold(plan, end_time=runner.end_time, say=tell).keep()
    if cause:
        print(f"logs are in {Path(plan.run_dir) / 'logs'}", flush=True)
    return int(cause)


class _Progress:
    """Prints new lines of the driver; lines from before this start are left out."""

    def __init__(self, run_dir: str, stage: str) -> None:
        self._run_dir, self._stage = run_dir, stage
        self._follower: Follower | None = None
        old = find_logs(run_dir, stage=stage, node=0)
        if old:
            self._follower = Follower(old[0], offset=old[0].path.stat().st_size)

    def tell(self) -> None:
        if self._follower is None:
            if not (logs := find_logs(self._run_dir, stage=self._stage, node=0)):
                return
            self._follower = Follower(logs[0])
        for line in self._follower.poll():
            if _TOLD.match(line.text):
                tell(f"{line.stamp[11:19]} {line.text}")
