"""Submission to Slurm through submitit; each job's batch script becomes the controller."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.run.chain import Link, links
from vime.run.folder import make_run_folder
from vime.run.jobs import Job, read_jobs, write_jobs
from vime.run.plan import Plan
from vime.run.scheduler import find_scheduler
from vime.schedulers.batch_script import job_name, python_words, sbatch_text, script_text, submit_folder
from vime.schedulers.container import mounts
from vime.slurm import queue as slurm
from vime.slurm import sbatch
from vime.system.files import PRIVATE, write_file
from vime.system.interrupts import interrupts_later
from vime.system.private import private_folder


class ControllerJob:
    """Pickled by submitit; holds only the run folder's path and the link's name."""

    def __init__(self, run_dir: str, link: str | None = None) -> None:
        self.run_dir, self.link = run_dir, link

    def __call__(self) -> str:
        # The controller's handlers replace submitit's, which would interrupt at any point.
        cause = find_scheduler("slurm").control(self.run_dir, link=self.link)
        if cause:
            sys.exit(int(cause))
        return cause.name

    def checkpoint(self) -> Any:
        """Called by submitit on a signal before the controller has installed its handlers: run again from the start."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def _executor(plan: Plan, link: Link | None = None, after: str | None = None) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # without Slurm's programs, the call of sbatch says what is missing

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return sbatch_text(plan, link, after)

        def _submit_command(self, command: str) -> Any:
            """Like submitit's, through vime's call of sbatch: cleaned environment, deadline, whole answer."""
            draft = self.folder / f".submission_file_{(word := uuid.uuid4().hex)}.sh"
            draft.write_text(self._make_submission_file_text(command, word), encoding="utf-8")
            try:
                job_id = sbatch.submit(draft, job_name(plan, link))
            except BadInput:
                draft.unlink()
                raise
            job = self.job_class(folder=self.folder, job_id=job_id, tasks=[0])
            job.paths.move_temporary_file(draft, "submission_file", keep_as_symlink=True)
            self._write_job_id(job_id, word)
            self._set_job_permissions(job.paths.folder)
            return job

    executor = Executor(submit_folder(plan), max_num_timeout=plan.max_timeouts)
    # submitit tells a time limit from a preemption by the time that has passed.
    executor.update_parameters(time=plan.cluster.time_limit_minutes)
    return executor


def write_scripts(plan: Plan) -> list[Path]:
    """Write scripts that a person can submit with sbatch: their last line starts vime.launch. Returns their paths."""
    folder, written = private_folder(submit_folder(plan)), []
    for link in links(plan) if plan.shape == "chain" else (None,):
        stage = ["--stage", link.name] if link else []
        words = [python_words(plan), "-u -m vime.launch --run-dir", shlex.quote(plan.run_dir), *stage]
        path = folder / f"{link.name if link else 'run'}.sbatch"
        write_file(path, script_text(plan, " ".join(words), link), mode=PRIVATE)
        written.append(path)
    return written


def submit(plan: Plan) -> str:
    """Submit the run; return the id of its (first) job."""
    return submit_jobs(plan)[0].job_id


def submit_jobs(plan: Plan) -> tuple[Job, ...]:
    """Submit the run's jobs, after `check_path`. Raises BadInput; then nothing is queued."""
    # The jobs unpickle files from here: nobody else may write to this folder, or to one above it.
    make_run_folder(plan.run_dir)
    private_folder(submit_folder(plan))
    jobs: list[Job] = []
    # A job that is queued and not recorded would run unknown to vime.status and vime.cancel.
    with interrupts_later():
        try:
            for link in links(plan) if plan.shape == "chain" else (None,):
                jobs.append(_submit_one(plan, link, jobs[-1].job_id if jobs else None))
            write_jobs(plan.run_dir, jobs)
        except BaseException:
            for job in jobs:
                slurm.cancel(job.job_id)
            raise
    return tuple(jobs)


def _submit_one(plan: Plan, link: Link | None, after: str | None) -> Job:
    name = None if link is None else link.name
    job = _executor(plan, link, after).submit(ControllerJob(plan.run_dir, name))
    return Job(job.job_id, name)


def check_container(plan: Plan) -> None:
    """Raise BadInput if a folder of the run cannot be mounted in the profile's container."""
    if plan.cluster.container is not None:
        mounts(plan, plan.cluster.container)


def check_path(run_dir: str) -> None:
    """Refuse `%` (expanded by Slurm in output names), newlines (break the script) and colons (separate paths)."""
    for character, name in (("%", "a percent sign"), ("\n", "a newline"), ("\\", "a backslash"), (":", "a colon")):
        if character in run_dir:
            raise BadInput(f"run folder {run_dir!r} has {name} in it, which a job cannot take: give another --run-dir")


def check_free(run_dir: str | os.PathLike[str]) -> None:
    """Raise BadInput while a job of this run folder is in the queue: it belongs to one run at a time."""
    for job in read_jobs(run_dir):
        state = slurm.job_state(job.job_id)
        if state is not None and state.active:
            raise BadInput(
                f"run folder {run_dir} belongs to job {job.job_id}, which is {state.state}: wait for its end, "
                "end it with python -m vime.cancel, or give another folder with --run-dir"
            )
