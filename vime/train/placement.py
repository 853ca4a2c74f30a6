"""Ray placement by the plan: one bundle per GPU, pinned to its logical node; actors verify where they woke up."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Any

from vime.errors import DeadlineExceeded, VimeError
from vime.node.ray_process import pin_resource
from vime.run.plan import Binding, Plan

# Share that a pinned bundle takes of its node's own resource (`pin_resource`); every node offers 1.
PIN = 0.001


class WrongPlace(VimeError):
    """An actor woke up on another node than the plan says."""


@dataclass(frozen=True)
class Slot:
    """One GPU of one logical node."""

    node: int
    gpu: int


def slots(plan: Plan) -> list[Slot]:
    """Every GPU slot that a trainer rank or an engine takes, in node order."""
    used = {Slot(rank.node, rank.gpu) for rank in plan.trainer_ranks}
    for engine in plan.servers:
        for node, gpus in zip(engine.nodes, engine.gpus, strict=True):
            used.update(Slot(node, gpu) for gpu in gpus)
    return sorted(used, key=lambda slot: (slot.node, slot.gpu))


def bundles(plan: Plan) -> list[dict[str, float]]:
    """Resources of every slot's bundle: its GPU, a CPU (threads are the plan's matter, not Ray's), its node's pin."""
    return [{"GPU": 1.0, "CPU": 1.0, pin_resource(slot.node): PIN} for slot in slots(plan)]


async def reserve(plan: Plan, *, deadline_s: float) -> Any:
    """The placement group of the run, once it is ready.

    It outlives the driver, since engines stand in it that the next driver of a kept cluster finds; Ray places bundles
    of a lost node again where its pin is offered.

    Ray waits forever for bundles that can never fit, so this raises DeadlineExceeded and names what no node offers.
    """
    import ray
    from ray.util.placement_group import get_placement_group, placement_group

    try:
        group = get_placement_group(plan.run_name)
    except ValueError:
        group = placement_group(bundles(plan), strategy="PACK", name=plan.run_name, lifetime="detached")
    try:
        await asyncio.wait_for(group.ready(), deadline_s)
    except TimeoutError:
        offered = {node["NodeManagerHostname"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
        wanted = sorted({pin_resource(slot.node) for slot in slots(plan)})
        missing = [key for key in wanted if not any(key in resources for resources in offered.values())]
        raise DeadlineExceeded(
            f"Ray did not place {len(bundles(plan))} GPU slots within {deadline_s:.0f} s: "
            + (f"no node offers {', '.join(missing)}" if missing else f"nodes offer {offered}")
        ) from None
    return group


def pinned(group: Any, plan: Plan, slot: Slot) -> dict[str, Any]:
    """Ray options of an actor on a slot. Ray would shuffle GPUs, so the plan names its GPU."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=slots(plan).index(slot)
        ),
    }


def verify_gpu(visible: int, gpu: int, what: str) -> None:
    """Check in an actor that CUDA sees exactly its planned GPU; `visible` is the number it sees. Raises WrongPlace."""
    if visible != 1:
        raise WrongPlace(f"{what} is planned on GPU {gpu} of {socket.gethostname()}, but CUDA sees {visible} such GPUs")


def verify_here(binding: Binding, node: int, what: str) -> None:
    """Check in an actor that it runs on the host bound to its logical node. Raises WrongPlace."""
    bound = binding.nodes[node]
    here = socket.gethostname()
    if here != bound.host:
        raise WrongPlace(f"{what} is planned on node {node} ({bound.host}) but woke up on {here}")
