"""Text of batch scripts and srun calls, exactly as Slurm gets it. Pure: needs neither Slurm nor submitit."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vime.launch.lead import lead_s
from vime.run.chain import Link, links, part
from vime.run.environment import export_lines
from vime.run.jobs import SUBMIT_FOLDER
from vime.run.plan import Plan
from vime.schedulers.srun import gpu_options, srun_argv, step_python

MAX_SIGNAL_LEAD_S = 65535
"""Longest signal lead in seconds that Slurm accepts."""
OUTPUT = "%j_0_log.out"
"""The job's output in the submit folder, under submitit's name."""


@dataclass(frozen=True)
class Script:
    """The batch script of one job."""

    link: str | None
    text: str


def cpus_needed(plan: Plan) -> int:
    """CPUs per node, for jobs that do not take whole nodes."""
    by_stage = [stage.tasks_per_node * (stage.cpus_per_task or 1) for stage in plan.stages]
    per_rank = plan.recipe.resources.num_cpus_per_rank or 1
    return plan.cluster.cpus_per_node or max([*by_stage, *(node.gpus * per_rank for node in plan.nodes)])


def job_name(plan: Plan, link: Link | None) -> str:
    """Name of a job in the queue."""
    return plan.run_name + (f"-{link.name}" if link else "")


def submit_folder(plan: Plan) -> Path:
    return Path(plan.run_dir) / SUBMIT_FOLDER


def sbatch_options(plan: Plan, link: Link | None = None, after: str | None = None) -> dict[str, str | int | bool]:
    """Long options of sbatch for a job; True stands for an option without a value.

    `after`: id of the job that must succeed before this link of a chain starts.
    """
    plan = part(plan, link)
    cluster = plan.cluster
    options: dict[str, str | int | bool | None] = {
        "job-name": job_name(plan, link),
        "nodes": len(plan.nodes) + plan.spares,
        "ntasks-per-node": 1,
        "time": cluster.time_limit_minutes,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mem": cluster.mem,
        "exclusive": True if cluster.exclusive else None,
        "cpus-per-task": None if cluster.exclusive else cpus_needed(plan),
        **gpu_options(cluster, cluster.gpus_per_node),
        "output": str(submit_folder(plan) / OUTPUT),
        # A requeued job continues the output of its first start.
        "open-mode": "append",
        # B: signal the batch process, which is the controller, instead of the steps.
        "signal": f"B:USR2@{min(math.ceil(lead_s(plan)), MAX_SIGNAL_LEAD_S)}",
        "requeue": True,
        # With spares the run recovers in its allocation, which Slurm would otherwise end when it loses a node.
        **({"no-kill": True} if plan.spares else {}),
        # kill-on-invalid-dep: otherwise a job whose dependency has failed would wait for ever.
        **({"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"} if after else {}),
        **cluster.extra_sbatch,
    }
    return {name: value for name, value in options.items() if value is not None}


def batch_script(options: Mapping[str, str | int | bool], setup: Sequence[str], command: str) -> str:
    """A batch script: options in alphabetical order, shell lines, and the command that replaces the shell."""
    flags = [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in sorted(options.items())
    ]
    # submitit reads the variable in the job.
    end = ["", "# command", "export SUBMITIT_EXECUTOR=slurm", command, ""]
    return "\n".join(["#!/bin/bash", "", "# Parameters", *flags, "", "# setup", *setup, *end])


def python_words(plan: Plan) -> str:
    """Start of a script's command. exec: the batch process must be Python itself, the only one that Slurm signals."""
    return "exec " + shlex.quote(plan.cluster.interpreter or sys.executable)


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
        '    rm -f "$words"',
        "    exit 2",
        "fi",
        'rm -f "$words"',
    ]


def script_text(plan: Plan, command: str, link: Link | None = None, after: str | None = None) -> str:
    """Batch script of a job that runs this command."""
    return batch_script(sbatch_options(plan, link, after), setup_lines(plan), command)


def sbatch_text(plan: Plan, link: Link | None = None, after: str | None = None) -> str:
    """Batch script, exactly as it will be submitted."""
    words = f"{python_words(plan)} -u -m submitit.core._submit {shlex.quote(str(submit_folder(plan)))}"
    return script_text(plan, words, link, after)


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
