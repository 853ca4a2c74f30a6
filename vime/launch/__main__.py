"""`python -m vime.launch`, run by the batch scripts of `slurm/`: plans in the allocation, then becomes its controller.

For users who call sbatch themselves. A plan that the run folder already holds is used unchanged: by a requeued job, by
the next job of a chain, or after `vime.submit --dry-run --run-dir DIR`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import vime
from vime.cli import build_parser, command, split_flags
from vime.errors import BadInput
from vime.launch.prepare import start
from vime.planning.cluster import load_cluster
from vime.planning.request import plan_from
from vime.run.chain import Link, find_link, part
from vime.run.folder import PLAN, read_plan
from vime.run.jobs import Job, add_job
from vime.run.plan import Plan
from vime.run.scheduler import OwnJob, Scheduler, find_scheduler


def own_scheduler(args: argparse.Namespace) -> Scheduler:
    """Scheduler of the run folder's plan, else of the profile, else Slurm."""
    if args.run_dir is not None and (Path(args.run_dir) / PLAN).is_file():
        return find_scheduler(read_plan(args.run_dir).cluster.kind)
    return find_scheduler(load_cluster(args.cluster).kind if args.cluster else "slurm")


def in_allocation(args: argparse.Namespace, job: OwnJob) -> None:
    """Fill in nodes, partition and time of this job, and a run name that a requeue finds again."""
    name = f"{Path(args.recipe).stem}-{job.job_id}"
    if args.shape == "allocation":
        args.nodes = args.nodes or job.nodes - args.spares
        args.time = args.time or (str(job.time_limit_minutes) if job.time_limit_minutes else None)
    args.partition = args.partition or job.partition
    if args.run_dir is None:
        args.run_name = args.run_name or name


def planned(args: argparse.Namespace, flags: Sequence[str]) -> Plan:
    """Plan of the run folder, made and written if missing."""
    if args.run_dir is not None and (Path(args.run_dir) / PLAN).is_file():
        return read_plan(args.run_dir)
    plan = plan_from(args, flags, required=True, run_folder=True)
    if (Path(plan.run_dir) / PLAN).is_file():
        return read_plan(plan.run_dir)
    start(plan)
    return plan


def check_size(plan: Plan, link: Link | None, have: int) -> None:
    """Raise BadInput if the allocation has fewer nodes than the plan's part needs."""
    need = len(part(plan, link).nodes) + plan.spares
    if have < need:
        raise BadInput(f"the job has {have} nodes, but the plan takes {need}: submit with --nodes {need}")


def become(plan: Plan, link: Link | None, submit_dir: str) -> None:
    """Replace this process by one that imports the run's own code."""
    assert plan.code is not None
    path = [plan.code, submit_dir, os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
    stage = ["--stage", link.name] if link else []
    argv = [sys.executable, "-u", "-m", "vime.launch", "--run-dir", plan.run_dir, *stage]
    os.execve(argv[0], argv, env)


@command
def main(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    parser = build_parser("python -m vime.launch", "Run a plan in the allocation of this job.")
    parser.add_argument("--stage", help="of a chain: the stage that this job is for")
    args = parser.parse_args(own)
    if args.cluster == "local":
        raise BadInput("--cluster local has no meaning in a job: leave it out, or use python -m vime.submit")
    scheduler = own_scheduler(args)
    job = scheduler.own_job()
    if job is None:
        raise BadInput("vime.launch runs inside a job: submit with python -m vime.submit, or sbatch a script")
    in_allocation(args, job)
    plan = planned(args, flags)
    link = find_link(plan, args.stage)
    check_size(plan, link, job.nodes)
    if plan.code is not None and not Path(vime.__file__).is_relative_to(plan.code):
        become(plan, link, job.submit_dir)
    add_job(plan.run_dir, Job(job.job_id, link.name if link else None))
    return int(scheduler.control(plan.run_dir, link=link.name if link else None))


if __name__ == "__main__":
    sys.exit(main())
