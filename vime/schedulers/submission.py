"""Submission to Slurm through submitit; each job's batch script becomes the controller.

Making the scripts' text needs neither Slurm nor torch.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.launch.lead import lead_s
from vime.run.chain import Link, links, part
from vime.run.environment import export_lines
from vime.run.folder import make_run_folder
from vime.run.jobs import SUBMIT_FOLDER, Job, read_jobs, write_jobs
from vime.run.plan import Plan
from vime.run.scheduler import find_scheduler
from vime.schedulers.container import mounts
from vime.schedulers.srun import gpu_options, srun_argv, step_python
from vime.slurm import queue as slurm
from vime.slurm import sbatch
from vime.system.files import PRIVATE, write_file
from vime.system.private import private_folder

MAX_SIGNAL_LEAD_S = 65535
"""Longest signal lead in seconds that Slurm accepts."""


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


@dataclass(frozen=True)
class Script:
    """The batch script of one job."""

    link: str | None
    text: str


def cpus_needed(plan: Plan) -> int:
    """CPUs per node, for jobs that do not take whole nodes."""
    by_stage = [stage.tasks_per_node * (stage.cpus_per_task or 1) for stage in plan.stages]
    per_slot = plan.recipe.resources.num_cpus_per_rank or 1
    return plan.cluster.cpus_per_node or max([*by_stage, *(node.gpus * per_slot for node in plan.nodes)])


def job_name(plan: Plan, link: Link | None) -> str:
    """Name of a job in the queue."""
    return plan.run_name + (f"-{link.name}" if link else "")


def sbatch_parameters(plan: Plan, link: Link | None = None, after: str | None = None) -> dict[str, Any]:
    """Options of a job under submitit's names; those without a name there go into `additional_parameters`.

    `after`: id of the job that must succeed before this link of a chain starts.
    """
    plan = part(plan, link)
    cluster = plan.cluster
    more: dict[str, Any] = {
        # B: signal the batch process, which is the controller, instead of the steps.
        "signal": f"B:USR2@{min(math.ceil(lead_s(plan)), MAX_SIGNAL_LEAD_S)}",
        "requeue": True,
        # kill-on-invalid-dep: otherwise a job whose dependency has failed would wait for ever.
        **({"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}),
        **cluster.extra_sbatch,
    }
    parameters: dict[str, Any] = {
        "job_name": job_name(plan, link),
        "nodes": len(plan.nodes) + plan.spares,
        "ntasks_per_node": 1,
        "time": cluster.time_limit_minutes,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": cluster.mem,
        "exclusive": True if cluster.exclusive else None,
        "cpus_per_task": None if cluster.exclusive else cpus_needed(plan),
        "wckey": None,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": setup_lines(plan),
        "additional_parameters": more,
    }
    gpus = gpu_options(cluster, cluster.gpus_per_node)
    parameters.update({name.replace("-", "_"): value for name, value in gpus.items()})
    return {name: value for name, value in parameters.items() if value is not None or name == "wckey"}


def setup_lines(plan: Plan) -> list[str]:
    """Shell lines before Python starts: the profile's setup and environment, and the run's code first on the path."""
    cluster = plan.cluster
    lines = module_lines(cluster.modules) if cluster.modules else []
    if cluster.venv is not None:
        lines.append(f"source {shlex.quote(f'{cluster.venv}/bin/activate')}")
    lines += [*cluster.setup, *export_lines(cluster.env)]
    if plan.code is not None:
        # The submit folder may hold plug-ins, but may also be the checkout, so it comes second.
        # Python itself would put it first.
        lines.append(f'export PYTHONPATH={shlex.quote(plan.code)}:"$SLURM_SUBMIT_DIR${{PYTHONPATH:+:$PYTHONPATH}}"')
        lines.append("export PYTHONSAFEPATH=1")
    return lines


def module_lines(modules: Sequence[str]) -> list[str]:
    """Shell lines that load modules, or end the job with a message on failure.

    A batch shell may lack the function `module`, and its old versions succeed for an unknown module.
    """
    names = shlex.join(modules)
    missing = shlex.quote(f"error: the modules {' '.join(modules)} of the cluster profile cannot be loaded on")
    return [
        "for file in /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh /etc/profile.d/modules.sh; do",
        '    type module >/dev/null 2>&1 || { [ -r "$file" ] && . "$file"; }',
        "done",
        "failed= words=$(mktemp)",
        f'module load {names} 2>"$words" || failed=1',
        'cat "$words" >&2',
        'if [ -n "$failed" ] || grep -qiE "unable to locate|not found|unknown" "$words"; then',
        f'    echo {missing} "$(hostname)" >&2',
        "    exit 2",
        "fi",
        'rm -f "$words"',
    ]


def _executor(plan: Plan, link: Link | None = None, after: str | None = None) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # the script's text can be made on a machine without Slurm

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

    # exec: the batch process must be Python itself, since Slurm signals only that process.
    python = "exec " + shlex.quote(plan.cluster.interpreter or sys.executable)
    executor = Executor(submit_folder(plan), max_num_timeout=plan.max_timeouts, python=python)
    executor.update_parameters(**sbatch_parameters(plan, link, after))
    return executor


def submit_folder(plan: Plan) -> Path:
    return Path(plan.run_dir) / SUBMIT_FOLDER


def sbatch_text(plan: Plan, link: Link | None = None, after: str | None = None) -> str:
    """Batch script, exactly as it will be submitted."""
    executor = _executor(plan, link, after)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def scripts(plan: Plan) -> tuple[Script, ...]:
    """Batch scripts of a run in order, without dependencies: the ids of later jobs do not exist yet."""
    if plan.shape == "chain":
        return tuple(Script(link.name, sbatch_text(plan, link)) for link in links(plan))
    return (Script(None, sbatch_text(plan)),)


def step_calls(plan: Plan) -> list[str]:
    """One shell line per stage with its srun call; node names are known only in the allocation."""
    lines = []
    for stage in plan.stages:
        python = step_python(plan.cluster)
        argv = srun_argv(
            stage, ["NODE"] * len(stage.nodes), plan=plan, python=python, cpus_per_node=plan.cluster.cpus_per_node
        )
        lines.append(shlex.join("--nodelist=NODES" if word.startswith("--nodelist=") else word for word in argv))
    return lines


def write_scripts(plan: Plan) -> list[Path]:
    """Write scripts that a person can submit with sbatch: their last line starts vime.launch. Returns their paths."""
    folder, written = private_folder(submit_folder(plan)), []
    for link in links(plan) if plan.shape == "chain" else (None,):
        executor = _executor(plan, link)
        words = ["-u -m vime.launch --run-dir", shlex.quote(plan.run_dir), *(["--stage", link.name] if link else [])]
        path = folder / f"{link.name if link else 'run'}.sbatch"
        write_file(path, executor._make_submission_file_text(" ".join([executor.python, *words]), ""), mode=PRIVATE)
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
    try:
        for link in links(plan) if plan.shape == "chain" else (None,):
            jobs.append(_submit_one(plan, link, jobs[-1].job_id if jobs else None))
    except BaseException:
        for job in jobs:
            slurm.cancel(job.job_id)
        raise
    write_jobs(plan.run_dir, jobs)
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
