"""`python -m vime.attach [RUN] [--node N] [-- COMMAND…]`: open a shell on a node of a running run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vime.cli import Parser, command, split_flags
from vime.errors import BadInput
from vime.run.folder import BINDING, read_binding, read_plan
from vime.run.registry import find_run, last_run
from vime.run.scheduler import find_scheduler
from vime.run.state import run_state

SHELL = ("bash", "-i")


def find_host(names: Sequence[str], run_dir: Path, job_id: str, node: int) -> str:
    """The scheduler's name of a logical node, of the job's nodes `names` in the order of its allocation.

    Before the binding exists `node` counts the allocation's nodes. Raises BadInput for a node that the run lacks.
    """
    if (run_dir / BINDING).exists() and (binding := read_binding(run_dir)).job_id == job_id:
        names = tuple(names[bound.slurm_index] for bound in binding.nodes)
    if not 0 <= node < len(names):
        raise BadInput(f"--node is {node}: the job has nodes 0 to {len(names) - 1}")
    return names[node]


def attach(run_dir: Path, node: int, command: Sequence[str], *, terminal: bool) -> tuple[list[str], dict[str, str]]:
    """Program and environment that run the command in the run's allocation. Raises BadInput where no job of it runs."""
    plan, state = read_plan(run_dir), run_state(run_dir)
    scheduler = find_scheduler(plan.cluster.kind)
    if plan.cluster.one_machine:
        raise BadInput(f"{state.run} runs on a machine without a scheduler: open a shell there")
    if state.job is None or state.ended:
        raise BadInput(f"{state.run} is {state.state}: only a running run can be attached to")
    host = find_host(scheduler.hosts(state.job), run_dir, state.job, node)
    return scheduler.attach(state.job, host, command, run_dir=str(run_dir), terminal=terminal)


def _become(call: list[str], env: dict[str, str]) -> NoReturn:
    sys.stdout.flush()
    os.execvpe(call[0], call, env)


@command
def main(argv: Sequence[str]) -> int:
    own, words = split_flags(argv)
    parser = Parser(
        prog="python -m vime.attach",
        description="Open a shell on a node of a running run, inside its allocation; or run a command, given after --.",
    )
    parser.add_argument("run", nargs="?", help="name or folder of the run; default: the last one")
    parser.add_argument("--node", type=int, default=0, help="logical node, as in vime.plan --placement; default: 0")
    args = parser.parse_args(own)
    folder = find_run(args.run) if args.run else last_run()
    call, env = attach(folder, args.node, words or SHELL, terminal=not words)
    _become(call, {**env, "VIME_RUN": str(folder)})


if __name__ == "__main__":
    sys.exit(main())
