"""`vime eval`: evaluate a checkpoint of a run, or an HF folder, with engines alone, in a job of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import vime
from vime.cli import DEFAULT_RECIPE, Parser, command, split_flags
from vime.errors import BadInput
from vime.launch.prepare import start
from vime.planning.cluster import load_cluster, parse_minutes
from vime.planning.request import check_fits
from vime.planning.show import render
from vime.planning.subject import Shape, of_folder, of_run, plan_evaluation
from vime.recipe.load import load_recipe, with_absolute_paths, with_flags
from vime.run import code as snapshot
from vime.run.folder import PLAN, read_plan
from vime.run.plan import Cluster, Plan
from vime.run.registry import find_run
from vime.run.scheduler import find_scheduler
from vime.system.redact import redact


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m vime.eval",
        description="Evaluate a checkpoint of a run, or any HF folder: engines only, in a job of their own. The values "
        "of a run's checkpoint become a point of the run's curves.",
        epilog="Options of the recipe follow --, as in: -- --eval-prompt-data aime aime.jsonl --eval-temperature 0",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("what", help="folder or name of a run, or an HF folder")
    add("--checkpoint", type=int, metavar="N", help="rollout whose checkpoint is evaluated; default: the newest")
    add("--weights", metavar="DIR", help="HF folder that holds this checkpoint already; default: that of --save-hf")
    add("--recipe", help=f"recipe for an HF folder: its engines and sampling; default: {DEFAULT_RECIPE}")
    add("--nodes", type=int, help="nodes of the job; default: eval-job of the profile, then those of one engine")
    add("--cluster", help="cluster profile; default: the run's")
    add("--partition", help="Slurm partition; default: eval-job of the profile")
    add("--time", help="time limit: minutes, H:M:S or D-H; default: eval-job of the profile")
    add("--base-dir", help="shared folder of models, data and checkpoints; default: the run's, then $BASE_DIR")
    add("--run-dir", help="folder of the evaluation of an HF folder; default: a new one in $BASE_DIR/runs")
    add("--dry-run", action="store_true", help="print the plan and the batch script, submit nothing")
    return parser


@command
def main(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    args = _parser().parse_args(own)
    if args.nodes is not None and args.nodes < 1:
        raise BadInput(f"--nodes is {args.nodes}: give at least 1")
    minutes = parse_minutes(args.time) if args.time else None
    shape = Shape(args.nodes, args.partition, minutes)
    folder = Path(args.what).expanduser()
    plain = (folder / "config.json").is_file() and not (folder / PLAN).is_file()
    plan = _folder_plan(args, flags, shape) if plain else _run_plan(args, flags, shape)
    scheduler = find_scheduler(plan.cluster.kind)
    if args.dry_run:
        print(render(plan))
        for preview in scheduler.preview(plan):
            print(redact(f"{preview.title}\n\n{preview.text}"))
        return 0
    check_fits(plan)
    scheduler.check(plan)
    start(plan, listed=plain)
    return scheduler.submit(plan)


def _run_plan(args: argparse.Namespace, flags: Sequence[str], shape: Shape) -> Plan:
    for option in ("recipe", "run_dir"):
        if getattr(args, option) is not None:
            raise BadInput(f"--{option.replace('_', '-')} has no meaning for a run: it has its own, leave it out")
    run = read_plan(find_run(args.what))
    if run.evaluation is not None:
        raise BadInput(f"{run.run_dir} is an evaluation: give the run that was trained")
    recipe = with_absolute_paths(with_flags(run.recipe, flags), args.base_dir or run.base_dir)
    cluster = load_cluster(args.cluster) if args.cluster else run.cluster
    subject = of_run(run, args.checkpoint, args.weights and os.path.abspath(os.path.expanduser(args.weights)))
    plan = plan_evaluation(recipe, cluster, subject, shape)
    if run.code is not None and Path(vime.__file__).is_relative_to(run.code):
        return plan.model_copy(update={"code": run.code})
    return _with_code(plan)


def _folder_plan(args: argparse.Namespace, flags: Sequence[str], shape: Shape) -> Plan:
    for option in ("checkpoint", "weights"):
        if getattr(args, option) is not None:
            raise BadInput(f"--{option} has no meaning for an HF folder: give a run, or leave it out")
    cluster = load_cluster(args.cluster) if args.cluster else Cluster(name="slurm", kind="slurm")
    base = args.base_dir or os.environ.get("BASE_DIR") or cluster.base_dir
    base = None if base is None else os.path.abspath(os.path.expanduser(base))
    recipe = with_absolute_paths(load_recipe(args.recipe or DEFAULT_RECIPE, flags), base)
    subject = of_folder(args.what, recipe, base_dir=base, run_dir=args.run_dir, name=None)
    return _with_code(plan_evaluation(recipe, cluster, subject, shape))


def _with_code(plan: Plan) -> Plan:
    """The plan with a copy of the code, where its job starts later."""
    if not find_scheduler(plan.cluster.kind).copies_code or (taken := snapshot.look(plan.recipe)) is None:
        return plan
    return plan.model_copy(update={"code": snapshot.folder_of(plan.run_dir, taken)})


if __name__ == "__main__":
    sys.exit(main())
