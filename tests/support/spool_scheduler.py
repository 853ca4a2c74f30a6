"""Example of a third-party scheduler: a spool folder, with processes of this machine as jobs.

`$SPOOL` is the folder; while `$SPOOL/hold` exists, jobs wait. Profiles name it as
`kind: tests.support.spool_scheduler:Spool`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput, Cause, SchedulerError
from vime.run.jobs import Job, write_jobs
from vime.run.plan import Cluster, Plan
from vime.run.scheduler import PATIENCE_S, JobState, OwnJob, Phase, Preview, Wanted
from vime.schedulers.runner_local import LocalRunner


def spool() -> Path:
    return Path(os.environ["SPOOL"])


class SpoolRunner(LocalRunner):
    """Job steps are child processes of the job."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.job = os.environ["SPOOL_JOB"]


class Spool:
    """See vime.run.scheduler.Scheduler for the contract of each method."""

    copies_code = False

    def resolve(self, cluster: Cluster, wanted: Wanted, *, timeout_s: float) -> tuple[Cluster, list[str]]:
        if "SPOOL" not in os.environ:
            raise SchedulerError("there is no spool folder: set SPOOL")
        if wanted.nodes > 1:
            raise BadInput(f"--nodes: the run needs {wanted.nodes} nodes, but the spool has 1")
        return cluster.model_copy(update={"partition": "spool"}), ["partition spool chosen: 1 node"]

    def preview(self, plan: Plan) -> list[Preview]:
        return [Preview("Process of the job", " ".join(self._argv(plan)))]

    def write_scripts(self, plan: Plan) -> list[Path]:
        return []

    def check(self, plan: Plan) -> None:
        if len(plan.nodes) > 1:
            raise BadInput("the spool has one node: give --nodes 1")

    def submit(self, plan: Plan) -> int:
        with (spool() / "output").open("ab") as output:
            process = subprocess.Popen(self._argv(plan), start_new_session=True, stdout=output, stderr=output)
        (spool() / str(process.pid)).write_text("waiting")
        write_jobs(plan.run_dir, [Job(str(process.pid))])
        print(f"job {process.pid}: python -m vime.status shows it")
        return 0

    def after(self, plan: Plan, job_ids: Sequence[str]) -> Plan:
        raise BadInput("the spool cannot order jobs")

    def job(self, job_id: str, *, timeout_s: float = PATIENCE_S) -> JobState | None:
        try:
            phase = (spool() / job_id).read_text()
        except FileNotFoundError:
            return None
        phases: dict[str, Phase] = {"waiting": "waiting", "running": "running"}
        return JobState(job_id, phase.upper(), phases.get(phase, "ended"), reason="Hold" if phase == "waiting" else "")

    def cancel(self, job_id: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job_id), signal.SIGTERM)

    def hosts(self, job_id: str) -> tuple[str, ...]:
        job = self.job(job_id)
        if job is None or job.phase != "running":
            raise BadInput(f"job {job_id} does not run")
        return (os.uname().nodename,)

    def attach(
        self, job_id: str, host: str, command: Sequence[str], *, run_dir: str, terminal: bool
    ) -> tuple[list[str], dict[str, str]]:
        return ["env", "-C", run_dir, *command], {**os.environ, "SPOOL_JOB": job_id}

    def own_job(self) -> OwnJob | None:
        job_id = os.environ.get("SPOOL_JOB")
        return None if job_id is None else OwnJob(job_id, nodes=1)

    def control(self, run_dir: str, *, link: str | None = None) -> Cause:
        from vime.launch.controller import control

        return control(run_dir, SpoolRunner, link=link)

    def _argv(self, plan: Plan) -> list[str]:
        return [sys.executable, "-m", "tests.support.spool_scheduler", plan.run_dir]


def main(run_dir: str) -> None:
    job = spool() / str(os.getpid())
    os.environ["SPOOL_JOB"] = job.name
    while not job.exists() or (spool() / "hold").exists():
        time.sleep(0.05)
    job.write_text("running")
    cause = Spool().control(run_dir)
    job.write_text(cause.name.lower())


if __name__ == "__main__":
    main(sys.argv[1])
