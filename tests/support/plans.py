"""Plans of the shipped recipes, made without reading a checkpoint, and plan entries for tests."""

from __future__ import annotations

from pathlib import Path

from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.plan import Binding, BoundNode, EnginePlan, Plan

BASE = "/shared/models"


def plan_of(
    recipe: str,
    *flags: str,
    nodes: int = 2,
    cluster: str = "local",
    base: str | Path = BASE,
    run_dir: str | Path = "/shared/run",
) -> Plan:
    """Plan of a shipped recipe with these flags; neither inputs nor the run folder are looked at."""
    return make_plan(
        load_recipe(recipe, list(flags)),
        cluster=load_cluster(cluster),
        nodes=nodes,
        base_dir=base,
        run_dir=run_dir,
        run_name="test",
        checks=Checks(inputs=False, run_folder=False),
    )


def bound(nodes: int, *, port_offset: int = 0, interface: str | None = None) -> Binding:
    """Node i is host `n<i>` at 10.0.0.<10+i>."""
    return Binding(
        nodes=tuple(
            BoundNode(index=i, host=f"n{i}", address=f"10.0.0.{10 + i}", interface=interface) for i in range(nodes)
        ),
        port_offset=port_offset,
    )


def engine_plan(
    index: int, gpus: dict[int, tuple[int, ...]], *, tensor: int = 1, data: int = 1, expert_parallel: bool = False
) -> EnginePlan:
    """An engine on these GPUs (node to GPUs)."""
    return EnginePlan(
        index=index,
        nodes=tuple(gpus),
        gpus=tuple(gpus.values()),
        tensor_parallel_size=tensor,
        data_parallel_size=data,
        expert_parallel=expert_parallel,
        port=1,
        aux_port=2,
    )
