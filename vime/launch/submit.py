"""Submission to Slurm: one job whose batch script becomes the controller, through submitit.

Needs neither Slurm nor torch to make the script's text.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.planning.types import Plan

SUBMIT_FOLDER, JOB_FILE = "submit", "job.json"
MAX_SIGNAL_LEAD_S = 65535
"""Slurm's limit."""
_CALL_SECONDS = 60.0


class ControllerJob:
    """What submitit pickles: the path of the run folder, nothing else."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir

    def __call__(self) -> str:
        from vime.launch.controller import control
        from vime.launch.runner_slurm import SlurmRunner

        # The controller's handlers replace submitit's, which would act in the middle of anything.
        cause = control(self.run_dir, SlurmRunner)
        if cause:
            sys.exit(int(cause))
        return cause.name

    def checkpoint(self) -> Any:
        """Called by submitit for a signal before the controller has handlers of its own: run again from the start."""
        from submitit.core.utils import DelayedSubmission

        return DelayedSubmission(self)


def cpus_needed(plan: Plan) -> int:
    """CPUs a node, where the job does not take whole nodes."""
    by_stage = [stage.tasks_per_node * (stage.cpus_per_task or 1) for stage in plan.stages]
    per_slot = plan.recipe.cluster.num_cpus_per_rank or 1
    return plan.cluster.cpus_per_node or max([*by_stage, *(node.gpus * per_slot for node in plan.nodes)])


def sbatch_parameters(plan: Plan) -> dict[str, Any]:
    """Options of the job in submitit's names; those that it has no name for stand in `additional_parameters`."""
    cluster = plan.cluster
    more: dict[str, Any] = {
        # B: signals the batch process, which is the controller; without it Slurm would signal the steps.
        "signal": f"B:USR2@{min(plan.signal_lead_s, MAX_SIGNAL_LEAD_S)}",
        "requeue": True,
        **cluster.extra_sbatch,
    }
    parameters: dict[str, Any] = {
        "job_name": plan.run_name,
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
        "setup": [*cluster.setup, *(f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items())],
        "additional_parameters": more,
    }
    if cluster.gpus_per_node and cluster.gpu_request == "gpus-per-node":
        parameters["gpus_per_node"] = cluster.gpus_per_node
    elif cluster.gpus_per_node and cluster.gpu_request == "gres":
        parameters["gres"] = f"gpu:{cluster.gpus_per_node}"
    return {name: value for name, value in parameters.items() if value is not None or name == "wckey"}


def _executor(plan: Plan) -> Any:
    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # the script's text can be made on a machine without Slurm

    # exec: the batch process must be Python itself, since Slurm signals that process alone.
    python = "exec " + shlex.quote(plan.cluster.python or sys.executable)
    executor = Executor(submit_folder(plan), max_num_timeout=plan.max_timeouts, python=python)
    executor.update_parameters(**sbatch_parameters(plan))
    return executor


def submit_folder(plan: Plan) -> Path:
    return Path(plan.run_dir) / SUBMIT_FOLDER


def sbatch_text(plan: Plan) -> str:
    """The batch script, exactly as it will be submitted."""
    executor = _executor(plan)
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit(plan: Plan) -> str:
    """Submits the controller; the job's id. `check_path` and `check_accepted` go before. Raises BadInput."""
    folder = submit_folder(plan)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The job unpickles what lies here: nobody else may write to it.
    folder.chmod(0o700)
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        job = _executor(plan).submit(ControllerJob(plan.run_dir))
    except (FailedJobError, FailedSubmissionError) as error:
        raise BadInput(f"sbatch refused the job: {_last_line(str(error))}") from error
    _write_job(folder, job.job_id)
    return job.job_id


def check_path(run_dir: str) -> None:
    """Slurm reads `%` in the names of output files, and a script's line ends at a newline."""
    for character, name in (("%", "a percent sign"), ("\n", "a newline"), ("\\", "a backslash")):
        if character in run_dir:
            raise BadInput(f"run folder {run_dir!r} has {name} in it, which sbatch cannot take: give another --run-dir")


def check_accepted(text: str) -> None:
    """Asks Slurm whether it could ever run the job. Raises BadInput with its answer."""
    argv = ["sbatch", "--test-only"]
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=_CALL_SECONDS)
    except FileNotFoundError as error:
        raise BadInput(
            "there is no sbatch on this machine: submit from a login node, or use --cluster local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"sbatch did not answer within {_CALL_SECONDS:.0f} s: is Slurm's controller up?") from error
    if done.returncode:
        raise BadInput(f"Slurm would refuse the job: {_last_line(done.stderr)}")


def read_job(run_dir: str | os.PathLike[str]) -> str | None:
    """Id of the job that was submitted last for this run; None for a local run or before submission."""
    try:
        return json.loads((Path(run_dir) / SUBMIT_FOLDER / JOB_FILE).read_text(encoding="utf-8"))["job_id"]
    except FileNotFoundError:
        return None


def _write_job(folder: Path, job_id: str) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{JOB_FILE}.", dir=folder)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"job_id": job_id, "time": time.time()}, file)
    os.replace(temporary, folder / JOB_FILE)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
