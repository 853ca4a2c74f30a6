"""Argument lists of vime's srun calls. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vime.run.plan import Cluster, Plan, Stage
from vime.schedulers import container


def step_name(stage: str) -> str:
    return f"vime-{stage}"


def step_python(cluster: Cluster) -> str:
    """Interpreter of the tasks: the container's, the profile's, or the current one."""
    return cluster.container.python if cluster.container else cluster.interpreter or sys.executable


def srun_argv(stage: Stage, names: Sequence[str], *, plan: Plan, python: str, cpus_per_node: int | None) -> list[str]:
    """Argument list of srun for a stage on these nodes.

    Since Slurm 22.05 srun does not inherit CPUs from sbatch, so each step states them; steps share the job's nodes with
    the services and with each other, hence `--overlap`.
    """
    cpus = stage.cpus_per_task or max(1, (cpus_per_node or 1) // stage.tasks_per_node)
    if cpus_per_node is not None:
        cpus = max(1, min(cpus, cpus_per_node // stage.tasks_per_node))
    argv = [
        "srun",
        f"--job-name={step_name(stage.name)}",
        f"--nodes={len(names)}",
        f"--nodelist={','.join(names)}",
        f"--ntasks={len(names) * stage.tasks_per_node}",
        f"--ntasks-per-node={stage.tasks_per_node}",
        f"--cpus-per-task={cpus}",
        "--cpu-bind=none",
        "--overlap",
        "--kill-on-bad-exit=1",
        "--mpi=none",
        "--input=none",
        "--export=ALL",
    ]
    if stage.service:
        # A recovery keeps what serves on the other nodes; Slurm would end the step when it gives up the lost one.
        argv.append("--no-kill")
    argv.extend(f"--{name}={value}" for name, value in gpu_options(plan.cluster, stage.gpus_per_node).items())
    argv.extend(container.srun_options(plan))
    task = [python, "-m", "vime.node.task", "--run", plan.run_dir, "--stage", stage.name]
    return [*argv, *container.wrap(plan, stage, task)]


def gpu_options(cluster: Cluster, count: int) -> dict[str, str]:
    """Options of sbatch and srun that request GPUs per node in this cluster's syntax."""
    if not count or cluster.gpu_request == "none":
        return {}
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    return {"gres": f"gpu:{kind}{count}"} if cluster.gpu_request == "gres" else {"gpus-per-node": f"{kind}{count}"}


def attach_argv(job: str, host: str, command: Sequence[str], *, run_dir: str, terminal: bool) -> list[str]:
    """Argument list of srun for a command on a node of the job, next to the running stages."""
    argv = [
        "srun",
        f"--jobid={job}",
        "--job-name=vime-attach",
        "--nodes=1",
        f"--nodelist={host}",
        "--ntasks=1",
        "--cpus-per-task=1",
        "--cpu-bind=none",
        "--overlap",
        "--mpi=none",
        f"--chdir={run_dir}",
    ]
    return [*argv, *(["--pty"] if terminal else []), *command]
