"""Plan for a command line: recipe, cluster profile, sinfo's answers, checks before a submission."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from vime.errors import BadInput, SchedulerError
from vime.planning.build import Checks, fewest_nodes, make_plan
from vime.planning.cluster import load_cluster, parse_minutes
from vime.planning.fit import SHARED_GPU, shortages
from vime.planning.layout import nodes_apart
from vime.recipe.load import load_with_notes
from vime.recipe.schema import Recipe
from vime.run import code as snapshot
from vime.run.node_local import NODE_TMP, SOCKET_CHARACTERS, longest_socket
from vime.run.plan import Cluster, Plan
from vime.run.scheduler import PATIENCE_S, Wanted, find_scheduler

DRY_RUN_PATIENCE_S = 12.0
"""Deadline of a dry run's queries, in seconds. Slurm's clients wait ten for an unreachable controller."""


def plan_from(
    args: argparse.Namespace, flags: Sequence[str], *, required: bool, run_folder: bool, within: Plan | None = None
) -> Plan:
    """Make the plan that the options ask for. `required`: checkpoint and Slurm must be available.

    `within`: the run in whose held nodes this one shall run; the scheduler is then not asked.
    """
    loaded = load_with_notes(args.recipe, flags)
    recipe = loaded.recipe
    auto = args.nodes == "auto"
    nodes = 1 if auto else _nodes(args, recipe, flags)
    if args.spares < 0:
        raise BadInput(f"--spares is {args.spares}: give 0 or more")
    base_dir = args.base_dir or os.environ.get("BASE_DIR") or None
    cluster, found = (within.cluster, []) if within else _cluster(args, recipe, nodes, required=required)
    if auto:
        fit = fewest_nodes(recipe, cluster, base_dir, required=required)
        recipe, nodes = fit.recipe, fit.nodes
        cluster, found = _cluster(args, recipe, nodes, required=required)
        found = [*found, " ".join((f"--nodes auto: {nodes} nodes", *(("with", *fit.flags) if fit.flags else ())))]
    if (length := longest_socket(cluster.env)) > SOCKET_CHARACTERS:
        raise BadInput(
            f"{NODE_TMP} is {cluster.env[NODE_TMP]} in the profile's env: the path of a socket below it has {length} "
            f"characters, at most {SOCKET_CHARACTERS} work: give a shorter folder"
        )
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
    if (
        find_scheduler(cluster.kind).copies_code
        and not args.no_snapshot
        and (taken := snapshot.look(plan.recipe)) is not None
    ):
        code = snapshot.folder_of(plan.run_dir, taken)
    return plan.model_copy(update={"notes": (*loaded.notes, *found, *plan.notes), "code": code})


def _nodes(args: argparse.Namespace, recipe: Recipe, flags: Sequence[str]) -> int | None:
    if args.nodes is None:
        return None
    if args.nodes < 1:
        raise BadInput(f"--nodes is {args.nodes}: give at least 1")
    trainer = recipe.resources.actor_num_nodes
    if "--actor-num-nodes" in flags and recipe.resources.colocate and trainer != args.nodes:
        raise BadInput(f"--nodes {args.nodes} and --actor-num-nodes {trainer} differ: with --colocate give one of them")
    return args.nodes


def _cluster(
    args: argparse.Namespace, recipe: Recipe, nodes: int | None, *, required: bool
) -> tuple[Cluster, list[str]]:
    """The profile, completed with the scheduler's data about its nodes."""
    gpus = recipe.resources.actor_num_gpus_per_node if recipe.resources.device == "gpu" else 0
    cluster = load_cluster(args.cluster) if args.cluster else Cluster(name="slurm", kind="slurm")
    update: dict[str, object] = {"time_limit_minutes": parse_minutes(args.time)} if args.time else {}
    if args.partition:
        update["partition"] = args.partition
    if args.node_memory:
        update["memory_per_node_bytes"] = args.node_memory
    cluster = cluster.model_copy(update=update)
    wanted = Wanted(
        nodes=(nodes or _default_nodes(recipe)) + args.spares,
        gpus_per_node=gpus,
        spares=args.spares,
        partition=args.partition,
        shape=args.shape,
    )
    try:
        resolved, found = find_scheduler(cluster.kind).resolve(
            cluster, wanted, timeout_s=PATIENCE_S if required else DRY_RUN_PATIENCE_S
        )
    except (BadInput, SchedulerError) as error:
        if required:
            raise BadInput(str(error)) from error
        what = "a submission would be refused" if isinstance(error, BadInput) else "planned without the scheduler"
        return _assumed(cluster, gpus), [f"{what}: {error}"]
    if args.time and resolved.time_limit_minutes < cluster.time_limit_minutes:
        raise BadInput(f"--time is {args.time}, but {found[0].removeprefix('time limit ')}: give at most that")
    return resolved, found


def _assumed(cluster: Cluster, gpus: int) -> Cluster:
    """The cluster for an unreachable scheduler: nodes hold whatever the recipe takes."""
    if cluster.gpus_per_node or cluster.gpu_request == "none":
        return cluster
    return cluster.model_copy(update={"gpus_per_node": gpus})


def _default_nodes(recipe: Recipe) -> int:
    options = recipe.resources
    return options.actor_num_nodes + nodes_apart(recipe, options.actor_num_gpus_per_node)


def check_fits(plan: Plan) -> None:
    """Raise BadInput if nodes lack host memory, or if trainer and engine cannot share a GPU as requested. A GPU's
    shortage for training alone is an estimate, so only a note."""
    for lack in shortages(plan):
        if lack.what == "host memory":
            raise BadInput(f"{lack}: python -m vime.plan shows what fits, and --nodes auto takes it (docs/plan.md)")
        if lack.what == SHARED_GPU:
            raise BadInput(f"{lack}: give a smaller --vllm-gpu-memory-utilization, or leave it out (docs/plan.md)")
        print(f"note: {lack}")
