"""`python -m vime.submit`: plans a run and submits it, or runs it on this machine with `--cluster local`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vime.cli import build_parser, command, split_flags
from vime.errors import BadInput
from vime.launch.prepare import check_same_run, start, write_code
from vime.planning.request import check_fits, plan_from
from vime.planning.show import render
from vime.recipe.flags import flag, recipe_options
from vime.recipe.load import load_recipe
from vime.recipe.schema import Recipe
from vime.run.folder import write_plan
from vime.run.jobs import forget_jobs
from vime.run.plan import Plan


def list_options(recipe: Recipe) -> str:
    """Every option of the recipe as a flag, with its value and its meaning."""
    lines = []
    for name, target in recipe_options().items():
        group = getattr(recipe, target.group)
        about = type(group).model_fields[target.field].description
        lines.append(f"{flag(name)} {getattr(group, target.field)}" + (f"   # {about}" if about else ""))
    return "\n".join(lines)


@command
def main(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    parser = build_parser(
        "python -m vime.submit", "Plan a run and submit it, or run it on this machine with --cluster local."
    )
    parser.add_argument("--dry-run", action="store_true", help="print plan and batch script and submit nothing")
    args = parser.parse_args(own)
    if args.flags:
        raise BadInput(f"unexpected argument {args.flags[0]!r}: options of the recipe stand after --")
    if args.list_options:
        print(list_options(load_recipe(args.recipe, flags)))
        return 0
    writes = not args.dry_run or args.run_dir is not None
    plan = plan_from(args, flags, required=not args.dry_run, run_folder=writes)
    plan = plan.model_copy(update={"command": tuple(argv)})
    if args.dry_run:
        return _dry_run(plan, write=args.run_dir is not None)
    check_fits(plan)
    if plan.cluster.kind != "local":
        return _submit(plan)
    if len(plan.nodes) > 1:
        raise BadInput(
            f"--nodes is {len(plan.nodes)}, but with --cluster local this machine is the only node: give --nodes 1, or "
            "try several nodes on one machine with slurm/devcluster (docs/clusters.md)"
        )
    return _local(plan)


def _dry_run(plan: Plan, *, write: bool) -> int:
    from vime.launch.submission import scripts, step_calls, write_scripts

    print(render(plan))
    slurm = plan.cluster.kind == "slurm"
    for script in scripts(plan) if slurm else ():
        print(f"Batch script{f' of {script.link}' if script.link else ''}\n")
        print(script.text)
    if slurm:
        print("Job steps, started by the controller\n")
        print("\n\n".join(step_calls(plan)))
    if write:
        check_same_run(plan)
        write_code(plan)
        print(f"plan written to {write_plan(plan)}")
        for path in write_scripts(plan) if slurm else ():
            print(f"script written to {path}")
    return 0


def _local(plan: Plan) -> int:
    from vime.launch import local

    start(plan)
    forget_jobs(plan.run_dir)
    return local.run(plan)


def _submit(plan: Plan) -> int:
    from vime.launch.submission import check_accepted, check_container, check_free, check_path, scripts, submit_jobs

    # Before anything is written: a run that Slurm would refuse leaves no folder behind.
    check_path(plan.run_dir)
    check_container(plan)
    check_free(plan.run_dir)
    check_accepted(scripts(plan))
    start(plan)
    jobs = ", ".join(f"{job.job_id} ({job.link})" if job.link else job.job_id for job in submit_jobs(plan))
    print(f"job {jobs}: python -m vime.status shows it, python -m vime.logs -f follows it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
