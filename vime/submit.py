"""`python -m vime.submit`: plans a run and submits it, or runs it on this machine with `--cluster local`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from vime.command import command
from vime.errors import BadInput
from vime.launch import snapshot
from vime.launch.discover import has_slurm, query_partitions, resolve
from vime.launch.jobs import forget_jobs
from vime.planning.build import Checks, fewest_nodes, make_plan
from vime.planning.cluster import load_cluster, machine_memory, parse_minutes
from vime.planning.fit import shortages
from vime.planning.io import PLAN, read_plan, write_plan
from vime.planning.registry import record_run
from vime.planning.show import render
from vime.planning.types import Cluster, Plan
from vime.recipe import files
from vime.recipe.flags import flag, recipe_options
from vime.recipe.load import load_recipe
from vime.recipe.schema import Recipe

DEFAULT_RECIPE = "deepseek-r1"
DRY_RUN_PATIENCE_S = 0.4
"""A dry run does not wait for a Slurm controller that is away."""


class Parser(argparse.ArgumentParser):
    """Tells a wrong command line in one line, as every other bad input."""

    def error(self, message: str) -> NoReturn:
        named = re.search(r"--([\w-]+)", message)
        name = named[1].replace("-", "_") if named else ""
        of_recipe = name in recipe_options() or name.startswith("vllm_")
        raise BadInput(
            message + (": options of the recipe stand after --" if of_recipe else f": see {self.prog} --help")
        )


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of a plan, common to vime.submit and vime.plan."""
    epilog = "Options of the recipe stand after --, as in: -- --lr 2e-6 --colocate"
    parser = Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", default=DEFAULT_RECIPE, help=f"name or YAML file; there are {', '.join(files.names('recipes'))}")
    add(
        "--nodes",
        type=_number_or_auto,
        help="nodes in all, without spares; auto: the fewest that fit; default: the recipe's",
    )
    add(
        "--node-memory",
        type=_gigabytes,
        metavar="GB",
        help="host memory of a node; default: the profile's, then sinfo's",
    )
    add("--cluster", help=f"name or YAML file of a profile ({', '.join(files.names('clusters'))}); default: ask sinfo")
    add("--base-dir", help="the shared folder of models, data and checkpoints; default: $BASE_DIR, then the profile's")
    add("--run-name", help="by default the recipe's name and the time")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--run-dir", help="folder of this run; one that holds a run goes on where it was saved")
    place.add_argument("--runs-dir", help="folder in which the run's folder is made; default: $BASE_DIR/runs")
    add("--shape", choices=("allocation", "chain"), default="allocation", help="one job, or a job a stage")
    add("--spares", type=int, default=0, help="nodes more, which replace those that preflight refuses")
    add("--time", help="time limit: minutes, H:M:S or D-H; default: the profile's")
    add("--partition", help="Slurm partition; default: the profile's, else Slurm's default")
    add("--no-snapshot", action="store_true", help="run the code that is there when the job starts, not that of now")
    add(
        "--verify",
        choices=("quick", "deep"),
        default="quick",
        help="before a stage's outputs are taken over: look at sizes, times and samples, or read and compare all bytes",
    )
    add("--list-options", action="store_true", help="print every option of the recipe and its value, and end")
    add("flags", nargs="*", metavar="-- FLAGS", help=argparse.SUPPRESS)
    return parser


def _number_or_auto(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return int(text)


def _gigabytes(text: str) -> int:
    """Bytes of a number of GB (10^9)."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GB above 0")
    return int(found * 1e9)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments and those after `--`."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def plan_from(args: argparse.Namespace, flags: Sequence[str], *, required: bool, run_folder: bool) -> Plan:
    """The plan that the options ask for. `required`: what it names must be there, checkpoint and Slurm alike."""
    recipe = load_recipe(args.recipe, flags)
    auto = args.nodes == "auto"
    nodes = 1 if auto else _nodes(args, recipe, flags)
    if args.spares < 0:
        raise BadInput(f"--spares is {args.spares}: give 0 or more")
    base_dir = args.base_dir or os.environ.get("BASE_DIR") or None
    cluster, found = _cluster(args, recipe, nodes, required=required)
    if auto:
        fit = fewest_nodes(recipe, cluster, base_dir, required=required)
        recipe, nodes = fit.recipe, fit.nodes
        cluster, found = _cluster(args, recipe, nodes, required=required)
        found = [*found, " ".join((f"--nodes auto: {nodes} nodes", *(("with", *fit.flags) if fit.flags else ())))]
    plan = make_plan(
        recipe,
        cluster=cluster,
        nodes=nodes,
        base_dir=base_dir,
        run_dir=args.run_dir,
        runs_dir=args.runs_dir,
        run_name=args.run_name,
        shape=args.shape,
        spares=args.spares,
        verify_deep=args.verify == "deep",
        checks=Checks(inputs=required, run_folder=run_folder),
    )
    code = None
    if cluster.kind == "slurm" and not args.no_snapshot and (taken := snapshot.look(plan.recipe)) is not None:
        code = snapshot.folder_of(plan.run_dir, taken)
    return plan.model_copy(update={"notes": (*found, *plan.notes), "code": code})


def _nodes(args: argparse.Namespace, recipe: Recipe, flags: Sequence[str]) -> int | None:
    if args.nodes is None:
        return None
    if args.nodes < 1:
        raise BadInput(f"--nodes is {args.nodes}: give at least 1")
    trainer = recipe.cluster.actor_num_nodes
    if "--actor-num-nodes" in flags and recipe.cluster.colocate and trainer != args.nodes:
        raise BadInput(f"--nodes {args.nodes} and --actor-num-nodes {trainer} differ: with --colocate give one of them")
    return args.nodes


def _cluster(
    args: argparse.Namespace, recipe: Recipe, nodes: int | None, *, required: bool
) -> tuple[Cluster, list[str]]:
    """The profile, completed by what sinfo says of the partition."""
    gpus = recipe.cluster.actor_num_gpus_per_node if recipe.cluster.device == "gpu" else 0
    cluster = load_cluster(args.cluster) if args.cluster else Cluster(name="slurm", kind="slurm")
    update: dict[str, object] = {"time_limit_minutes": parse_minutes(args.time)} if args.time else {}
    if args.partition:
        update["partition"] = args.partition
    if args.node_memory:
        update["memory_per_node_bytes"] = args.node_memory
    cluster = cluster.model_copy(update=update)
    if cluster.kind == "local":
        if args.partition or args.spares or args.shape != "allocation":
            raise BadInput("--partition, --spares and --shape have no meaning with --cluster local: leave them out")
        memory = cluster.memory_per_node_bytes or machine_memory()
        return cluster.model_copy(update={"memory_per_node_bytes": memory}), []
    if has_slurm():
        wanted = (nodes or _default_nodes(recipe)) + args.spares
        try:
            partitions = query_partitions() if required else query_partitions(timeout_s=DRY_RUN_PATIENCE_S)
            resolved, found = resolve(cluster, wanted, partitions, needs_gpus=gpus)
        except BadInput as error:
            if required:
                raise
            return _assumed(cluster, gpus), [f"a submission would be refused: {error}"]
        if args.time and resolved.time_limit_minutes < cluster.time_limit_minutes:
            raise BadInput(f"--time is {args.time}, but {found[0].removeprefix('time limit ')}: give at most that")
        return resolved, found
    if required:
        raise BadInput(
            "there is no Slurm on this machine: submit from a login node, or run here with --cluster local "
            "(docs/clusters.md)"
        )
    return _assumed(cluster, gpus), ["planned without Slurm: there is none on this machine"]


def _assumed(cluster: Cluster, gpus: int) -> Cluster:
    """Where Slurm cannot be asked, nodes hold what the recipe takes."""
    if cluster.gpus_per_node or cluster.gpu_request == "none":
        return cluster
    return cluster.model_copy(update={"gpus_per_node": gpus})


def _default_nodes(recipe: Recipe) -> int:
    options = recipe.cluster
    apart = 0 if options.colocate else -(-(options.rollout_num_gpus or 0) // options.actor_num_gpus_per_node)
    return options.actor_num_nodes + apart


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
    from vime.launch.submit import scripts, step_calls, write_scripts

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
    from vime.launch.submit import check_accepted, check_container, check_free, check_path, scripts, submit_jobs

    # Before anything is written: a run that Slurm would refuse leaves no folder behind.
    check_path(plan.run_dir)
    check_container(plan)
    check_free(plan.run_dir)
    check_accepted(scripts(plan))
    start(plan)
    jobs = ", ".join(f"{job.job_id} ({job.link})" if job.link else job.job_id for job in submit_jobs(plan))
    print(f"job {jobs}: python -m vime.status shows it, python -m vime.logs -f follows it")
    return 0


def check_fits(plan: Plan) -> None:
    """Refuses a run whose nodes are known to lack host memory; what a GPU lacks is an estimate, so a note."""
    for lack in shortages(plan):
        if lack.what == "host memory":
            raise BadInput(f"{lack}: python -m vime.plan shows what fits, and --nodes auto takes it (docs/plan.md)")
        print(f"note: {lack}")


def check_same_run(plan: Plan) -> None:
    """A run folder may be submitted again, to go on; not with another recipe or model."""
    if not (Path(plan.run_dir) / PLAN).exists():
        return
    before = read_plan(plan.run_dir)
    if (before.recipe.name, before.model_config_hf) != (plan.recipe.name, plan.model_config_hf):
        raise BadInput(
            f"run folder {plan.run_dir} holds a run of the recipe {before.recipe.name} or another model: "
            "give another folder with --run-dir"
        )


def write_code(plan: Plan) -> None:
    """Takes the snapshot that the plan names."""
    if plan.code is not None and (found := snapshot.look(plan.recipe)) is not None:
        snapshot.write(found, plan.code)


def start(plan: Plan) -> None:
    """Writes code and plan and records the run, so that vime.status and its siblings find it from here on."""
    check_same_run(plan)
    write_code(plan)
    write_plan(plan)
    record_run(plan.run_dir)
    print(f"run {plan.run_name}: {plan.run_dir}")
    for note in plan.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    sys.exit(main())
