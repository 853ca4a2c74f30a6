"""Slurm as a scheduler: the interface for all code outside of vime.schedulers and vime.slurm."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput, Cause, SchedulerError
from vime.planning.cluster import resolve
from vime.run.plan import Cluster, Plan
from vime.run.scheduler import PATIENCE_S, JobState, OwnJob, Preview, Wanted
from vime.schedulers import submission
from vime.schedulers.batch_script import scripts, step_calls
from vime.schedulers.srun import attach_argv
from vime.slurm import queue, sbatch
from vime.slurm.client import client_environment
from vime.slurm.hostlist import expand_hosts
from vime.slurm.partitions import has_slurm, query_partitions


class Slurm:
    """See vime.run.scheduler.Scheduler for the contract of each method."""

    copies_code = True

    def resolve(self, cluster: Cluster, wanted: Wanted, *, timeout_s: float) -> tuple[Cluster, list[str]]:
        if not has_slurm():
            raise SchedulerError(
                "there is no Slurm on this machine: submit from a login node, or run here with --cluster local "
                "(docs/clusters.md)"
            )
        partitions = query_partitions(timeout_s=timeout_s)
        return resolve(cluster, wanted.nodes, partitions, needs_gpus=wanted.gpus_per_node)

    def preview(self, plan: Plan) -> list[Preview]:
        texts = [
            Preview(f"Batch script{f' of {script.link}' if script.link else ''}", script.text)
            for script in scripts(plan)
        ]
        return [*texts, Preview("Job steps, started by the controller", "\n\n".join(step_calls(plan)))]

    def write_scripts(self, plan: Plan) -> list[Path]:
        return submission.write_scripts(plan)

    def check(self, plan: Plan) -> None:
        submission.check_path(plan.run_dir)
        submission.check_container(plan)
        submission.check_free(plan.run_dir)
        sbatch.check_accepted([script.text for script in scripts(plan)])

    def after(self, plan: Plan, job_ids: Sequence[str]) -> Plan:
        if plan.shape != "allocation":
            raise BadInput("--shape chain orders its own jobs: runs that wait for each other take --shape allocation")
        if not job_ids:
            return plan
        more = {**plan.cluster.extra_sbatch, "dependency": ":".join(("afterany", *job_ids))}
        return plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"extra_sbatch": more})})

    def submit(self, plan: Plan) -> int:
        submitted = submission.submit_jobs(plan)
        jobs = ", ".join(f"{job.job_id} ({job.link})" if job.link else job.job_id for job in submitted)
        print(f"job {jobs}: python -m vime.status shows it, python -m vime.logs -f follows it")
        return 0

    def job(self, job_id: str, *, timeout_s: float = PATIENCE_S) -> JobState | None:
        found = queue.query_job(job_id, seconds=timeout_s)
        if found is None:
            return None
        return JobState(job_id, found.state, found.phase, reason=found.reason, start=found.start, end=found.end)

    def cancel(self, job_id: str) -> None:
        queue.cancel(job_id)

    def hosts(self, job_id: str) -> tuple[str, ...]:
        job = queue.query_job(job_id)
        if job is None or job.state != "RUNNING":
            raise BadInput(f"job {job_id} is {job.state if job else 'gone'}: only a running job can be attached to")
        return expand_hosts(job.nodelist)

    def attach(
        self, job_id: str, host: str, command: Sequence[str], *, run_dir: str, terminal: bool
    ) -> tuple[list[str], dict[str, str]]:
        return attach_argv(job_id, host, command, run_dir=run_dir, terminal=terminal), client_environment(os.environ)

    def own_job(self) -> OwnJob | None:
        job_id = os.environ.get("SLURM_JOB_ID")
        if job_id is None:
            return None
        known = queue.job_state(job_id)
        return OwnJob(
            job_id,
            nodes=int(os.environ["SLURM_JOB_NUM_NODES"]),
            partition=os.environ.get("SLURM_JOB_PARTITION"),
            time_limit_minutes=None if known is None else known.time_limit_minutes,
            submit_dir=os.environ.get("SLURM_SUBMIT_DIR", ""),
        )

    def control(self, run_dir: str, *, link: str | None = None) -> Cause:
        # Imported here: a login node that only queries the queue does not need the controller's modules.
        from vime.launch.controller import control
        from vime.schedulers.runner_slurm import SlurmRunner

        return control(run_dir, SlurmRunner, link=link)
