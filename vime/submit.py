"""`vime submit`: plan a run and submit it, or run it on this machine with `--cluster local`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vime.cli import build_parser, command, split_flags
from vime.errors import BadInput
from vime.launch.prepare import claim_folder, start, write_code
from vime.planning.cluster import parse_hold
from vime.planning.request import check_fits, plan_from
from vime.planning.show import render
from vime.recipe.flags import flag, recipe_options
from vime.recipe.load import as_yaml, load_flags, load_recipe
from vime.recipe.schema import Recipe, help_texts
from vime.recipe.script import read_script, render_script
from vime.run.folder import read_plan, write_plan
from vime.run.hold import read_holding, request_run
from vime.run.jobs import Job, read_jobs, write_jobs
from vime.run.plan import Plan
from vime.run.registry import find_run
from vime.run.scheduler import find_scheduler
from vime.system.redact import redact


def list_options(recipe: Recipe) -> str:
    """Every option of the recipe as a flag, with its value and meaning."""
    lines = []
    for name, target in recipe_options().items():
        group = getattr(recipe, target.group)
        about = help_texts(type(group)).get(target.field)
        lines.append(f"{flag(name)} {getattr(group, target.field)}" + (f"   # {about}" if about else ""))
    return "\n".join(lines)


@command
def main(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    parser = build_parser(
        "python -m vime.submit", "Plan a run and submit it, or run it on this machine with --cluster local."
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the batch script, submit nothing")
    parser.add_argument(
        "--from-script", metavar="FILE", help="read another trainer's launch script, without running it"
    )
    parser.add_argument(
        "--write-recipe", metavar="FILE", help="with --from-script: write what it amounts to as a recipe"
    )
    parser.add_argument(
        "--hold", metavar="TIME", help="keep the nodes after the run until they were idle for so long: 4h, 30m"
    )
    parser.add_argument(
        "--in", dest="within", metavar="RUN", help="run in the nodes that this run keeps (--hold), without the queue"
    )
    args = parser.parse_args(own)
    if args.from_script:
        return _from_script(Path(args.from_script), args.write_recipe)
    if args.write_recipe:
        raise BadInput(
            f"--write-recipe {args.write_recipe} writes what a script amounts to: give --from-script with it"
        )
    if args.flags:
        raise BadInput(f"unexpected argument {args.flags[0]!r}: options of the recipe follow --")
    if args.list_options:
        print(list_options(load_recipe(args.recipe, flags)))
        return 0
    writes = not args.dry_run or args.run_dir is not None
    within = None if args.within is None else _holder(args)
    plan = plan_from(args, flags, required=not args.dry_run, run_folder=writes, within=within)
    plan = plan.model_copy(update={"command": tuple(argv), "hold_minutes": _hold_minutes(args)})
    if args.dry_run:
        return _dry_run(plan, write=args.run_dir is not None)
    check_fits(plan)
    if within is not None:
        return _run_in(within, plan)
    scheduler = find_scheduler(plan.cluster.kind)
    # Before anything is written: a run that would be refused leaves no folder behind.
    scheduler.check(plan)
    start(plan)
    return scheduler.submit(plan)


def _hold_minutes(args: argparse.Namespace) -> float:
    if args.hold is None:
        return 0.0
    if args.shape == "chain":
        raise BadInput("--hold with --shape chain: each job of a chain has other nodes, give --shape allocation")
    return parse_hold(args.hold)


def _holder(args: argparse.Namespace) -> Plan:
    """The run whose nodes are asked for. Raises BadInput for options that its allocation has decided."""
    for name in ("cluster", "partition", "time", "hold", "node_memory"):
        if getattr(args, name):
            raise BadInput(f"--{name.replace('_', '-')} with --in: the nodes are there already, leave it out")
    if args.shape != "allocation" or args.spares or args.nodes == "auto":
        raise BadInput("--in runs in nodes that are there: leave out --shape, --spares and --nodes auto")
    holder = read_plan(find_run(args.within))
    if not holder.hold_minutes:
        raise BadInput(f"{holder.run_dir} was submitted without --hold: its nodes are given back when it ends")
    args.base_dir = args.base_dir or holder.base_dir
    return holder


def _run_in(holder: Plan, plan: Plan) -> int:
    """Hand the run to the controller that holds the nodes."""
    held = read_holding(holder.run_dir)
    if len(plan.nodes) > held.nodes:
        raise BadInput(f"--nodes is {len(plan.nodes)}, but {holder.run_name} holds {held.nodes}: give at most that")
    start(plan)
    if jobs := read_jobs(holder.run_dir):
        write_jobs(plan.run_dir, [Job(jobs[-1].job_id)])
    request_run(holder.run_dir, plan.run_dir)
    print(f"{plan.run_name} starts in the nodes of {holder.run_name}: python -m vime.logs -f follows it")
    return 0


def _from_script(path: Path, target: str | None) -> int:
    """Shows what becomes of a script's flags, and the recipe; writes it where asked. Nothing is submitted."""
    script = read_script(path)
    loaded = load_flags(path.stem, script.flags)
    text = as_yaml(loaded.recipe)
    print(render_script(script))
    print("\n".join(("Recipe", *(f"  {line}" for line in text.splitlines()))))
    for note in loaded.notes:
        print(f"note: {note}")
    if target is None:
        return 0
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise BadInput(f"--write-recipe {target}: {error.strerror}: give a new file that can be written") from error
    print(f"recipe written to {target}: python -m vime.submit --recipe {target} submits it")
    return 0


def _dry_run(plan: Plan, *, write: bool) -> int:
    scheduler = find_scheduler(plan.cluster.kind)
    print(render(plan))
    for preview in scheduler.preview(plan):
        print(redact(f"{preview.title}\n\n{preview.text}"))
    if write:
        claim_folder(plan)
        write_code(plan)
        print(f"plan written to {write_plan(plan)}")
        for path in scheduler.write_scripts(plan):
            print(f"script written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
