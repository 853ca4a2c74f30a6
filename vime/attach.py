"""`python -m vime.attach [RUN] [--node N] [-- COMMAND…]`: a shell on a node of a running run, inside its allocation."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vime.cli import Parser, command, split_flags
from vime.errors import BadInput
from vime.launch.srun import attach_argv
from vime.run.folder import BINDING, read_binding, read_plan
from vime.run.registry import find_run, last_run
from vime.run.state import run_state
from vime.slurm.queue import expand_hosts, query_job

SHELL = ("bash", "-i")


def find_host(run_dir: Path, job_id: str, node: int) -> str:
    """Slurm's name of a logical node; before the binding exists, of a place in the allocation. Raises BadInput."""
    job = query_job(job_id)
    if job is None or job.state != "RUNNING":
        raise BadInput(f"job {job_id} is {job.state if job else 'gone'}: only a running job can be attached to")
    names = expand_hosts(job.nodelist)
    if (run_dir / BINDING).exists() and (binding := read_binding(run_dir)).job_id == job_id:
        names = tuple(names[bound.slurm_index] for bound in binding.nodes)
    if not 0 <= node < len(names):
        raise BadInput(f"--node is {node}: the job has nodes 0 to {len(names) - 1}")
    return names[node]


def attach(run_dir: Path, node: int, command: Sequence[str], *, terminal: bool) -> list[str]:
    """The srun call that runs the command in the run's allocation. Raises BadInput where no job of it runs."""
    plan, state = read_plan(run_dir), run_state(run_dir)
    if plan.cluster.kind == "local":
        raise BadInput(f"{state.run} runs on a machine without Slurm: open a shell there")
    if state.job is None or state.ended:
        raise BadInput(f"{state.run} is {state.state}: only a running run can be attached to")
    host = find_host(run_dir, state.job, node)
    return attach_argv(state.job, host, command, run_dir=str(run_dir), terminal=terminal)


def _become(call: list[str], env: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    os.execvpe(call[0], call, env)


@command
def main(argv: Sequence[str]) -> int:
    own, words = split_flags(argv)
    parser = Parser(
        prog="python -m vime.attach",
        description="A shell on a node of a running run, inside its allocation; or a command, after --.",
    )
    parser.add_argument("run", nargs="?", help="name or folder of the run; by default the last one")
    parser.add_argument("--node", type=int, default=0, help="logical node, as in vime.plan --placement; default: 0")
    args = parser.parse_args(own)
    folder = find_run(args.run) if args.run else last_run()
    call = attach(folder, args.node, words or SHELL, terminal=not words)
    _become(call, {**os.environ, "VIME_RUN": str(folder)})


if __name__ == "__main__":
    sys.exit(main())
