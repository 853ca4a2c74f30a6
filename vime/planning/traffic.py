"""Bytes that a run moves and their duration at the rates below: estimates, before anything is queued."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vime.planning import memory
from vime.run.plan import Plan

GB = 10**9
DISK = 2 * GB
"""Bytes/s that a node reads or writes on a shared file system under load."""
NETWORK = 50 * GB
"""Bytes/s of a GPU's network port (400 Gbit/s)."""
PCIE = 25 * GB
"""Bytes/s between a GPU and host memory, in either direction."""
DRAM = 300 * GB
"""Bytes/s of a node's host memory."""


@dataclass(frozen=True)
class Flow:
    """One movement of bytes."""

    name: str
    when: str
    bytes: int
    seconds: float
    """Duration at this module's rates, with maximal parallelism; 0 if unknown."""
    why: str


@dataclass(frozen=True)
class Space:
    """A file system that the run writes to."""

    path: str
    """Nearest folder that exists."""
    free_bytes: int
    needs: tuple[tuple[str, int], ...]
    """Artefacts still to be written there, and their bytes."""

    @property
    def needs_bytes(self) -> int:
        return sum(size for _, size in self.needs)

    @property
    def fits(self) -> bool:
        return self.needs_bytes <= self.free_bytes


def flows(plan: Plan) -> tuple[Flow, ...]:
    """Flows of the stages first, then those of every rollout, optimizer step and checkpoint."""
    return (*_stages(plan), *_rollout(plan), _checkpoint(plan))


def _stages(plan: Plan) -> list[Flow]:
    found = []
    for stage in plan.stages:
        moved = sum(artefact.bytes or 0 for artefact in (*stage.inputs, *stage.outputs) if artefact.kind != "run")
        if moved and not stage.service:
            nodes = len(plan.nodes) if stage.name == "train" else len(stage.nodes)
            inputs = " + ".join(a.name for a in stage.inputs if a.bytes)
            outputs = " + ".join(a.name for a in stage.outputs if a.bytes and a.kind != "run")
            why = f"reads {inputs}" + (f", writes {outputs}" if outputs else "")
            found.append(Flow(stage.name, "once", moved, moved / (nodes * DISK), f"{why}, {nodes} nodes"))
    return found


def _rollout(plan: Plan) -> list[Flow]:
    recipe, config = plan.recipe, plan.model
    weights = memory.Weights.of(recipe, config, plan.layout)
    size = memory.weight_bytes(config, weights, quantised=True)
    engines = max(1, len(plan.engines))
    gpus = sum(len(gpus) for engine in plan.engines for gpus in engine.gpus) or 1
    rate = NETWORK if recipe.resources.device == "gpu" else DISK
    kind = "block fp8" if config.quantisation else "bf16"
    what = f"{kind} weights to {engines} engine{'s' * (engines > 1)}"
    found = [Flow("weight sync", "each rollout", size * engines, size * engines / (gpus * rate), what)]
    if routes := memory.routes_bytes(recipe, config):
        why = "routes of all tokens to a file of the run folder, and out of it by the ranks, each its own"
        found.append(Flow("routes", "each rollout", 2 * routes, routes / DISK + routes / (len(plan.nodes) * DISK), why))
    kept = max(sum(_kept(plan, weights, rank) for rank in node.ranks) for node in plan.nodes)
    steps = f"{recipe.rollout.steps} a rollout"
    if recipe.optimizer.optimizer_cpu_offload and recipe.resources.device == "gpu":
        ranks = max(1, recipe.resources.actor_num_gpus_per_node)
        moved = (4 + (2 if recipe.model.bf16 else 4)) * kept
        why = "gradients down, weights up, on the fullest node"
        found.append(Flow("optimizer, PCIe", steps, moved, moved / (ranks * PCIE), why))
    step = recipe.optimizer.kind.step_traffic_bytes()
    moved = step * kept
    why = f"{step} bytes for each of {kept / 1e9:.2f} B parameters in the fullest node's memory"
    if recipe.optimizer.optimizer_cpu_offload or recipe.resources.device == "cpu":
        found.append(Flow("optimizer, host memory", steps, moved, moved / DRAM, why))
    return found


def _kept(plan: Plan, weights: memory.Weights, rank: int) -> int:
    return weights.stages[plan.trainer_ranks[rank].pp].of_optimizer_rank(plan.layout)


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of one checkpoint of the run."""
    return memory.checkpoint_bytes(plan.recipe, memory.Weights.of(plan.recipe, plan.model, plan.layout))


def checkpoint_seconds(plan: Plan) -> float:
    """Estimated seconds to write one checkpoint of the run."""
    return checkpoint_bytes(plan) / (len(plan.nodes) * DISK)


def _checkpoint(plan: Plan) -> Flow:
    size, options = checkpoint_bytes(plan), plan.recipe.checkpoint
    when = f"every {options.save_interval} rollouts" if options.save_interval else "at the end"
    if options.save_interval == "auto":
        when = "at times"
    kept = f"the newest {options.save_keep} are kept, one more while it is written"
    why = f"weights, master weights and optimizer states; {kept}"
    return Flow("checkpoint", when, size, checkpoint_seconds(plan), why)


def free_space(plan: Plan) -> tuple[Space, ...]:
    """File systems that the run writes to: current free space, and artefacts still to be written."""
    needs: dict[int, tuple[str, int, list[tuple[str, int]]]] = {}
    for artefact in (output for stage in plan.stages for output in stage.outputs):
        if not artefact.bytes or (artefact.kind != "run" and os.path.exists(artefact.path)):
            continue
        place = nearest_folder(artefact.path)
        status = os.statvfs(place)
        device = place.stat().st_dev
        _, _, found = needs.setdefault(device, (str(place), status.f_bavail * status.f_frsize, []))
        found.append((artefact.name, artefact.bytes))
    return tuple(Space(place, free, tuple(found)) for place, free, found in needs.values())


def nearest_folder(path: str) -> Path:
    """The path itself, or its nearest existing parent."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return place
