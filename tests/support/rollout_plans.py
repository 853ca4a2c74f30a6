"""Plans of the shipped recipes for the tests of this folder, made without reading a checkpoint."""

from __future__ import annotations

from pathlib import Path

from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.run.plan import Binding, BoundNode, Plan

BASE = "/shared/models"


def plan_of(
    recipe: str,
    nodes: int,
    *flags: str,
    cluster: str = "local",
    base: str | Path = BASE,
    run_dir: str | Path = "/shared/run",
) -> Plan:
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
