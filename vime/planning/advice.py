"""Recipe changes that lower a node's host memory, with the bytes that each saves."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from vime.planning.memory import ALLOCATOR_SETTINGS
from vime.run.plan import NodePlan, Plan


@dataclass(frozen=True)
class Lever:
    """One way to lower the memory of the fullest node."""

    saves_bytes: int
    what: str
    how: str
    """Flags to pass."""


def fullest(plan: Plan) -> NodePlan:
    """The node that needs the most host memory."""
    return max(plan.nodes, key=lambda node: node.host_memory.total_bytes)


def levers(plan: Plan) -> tuple[Lever, ...]:
    """Ways to lower the fullest node's memory, largest first; their savings add up."""
    recipe = plan.recipe
    items = {item.name: item for item in fullest(plan).host_memory.items}
    found = []

    def add(names: tuple[str, ...], what: str, how: str) -> None:
        if size := sum(items[name].bytes for name in names if name in items):
            found.append(Lever(size, what, how))

    if recipe.resources.device == "gpu":
        setting = {**recipe.misc.env, ALLOCATOR_SETTINGS[0]: "pinned_max_round_threshold_mb:1"}
        how = f"-- --env {shlex.quote(json.dumps(setting))}"
        add(("pinned_rounding", "backup_rounding"), "have torch pin buffers at their own size", how)
    flags = [flag for flag, on in (("--no-use-kl-loss", recipe.algorithm.use_kl_loss),
                                   ("--kl-coef 0", recipe.algorithm.kl_coef != 0)) if on]  # fmt: skip
    if flags:
        add(("reference_copy",), "train without the reference model", f"-- {' '.join(flags)}")
    if recipe.checkpoint.async_save:
        add(("save_buffers",), "write checkpoints while training waits", "-- --no-async-save")
    return tuple(sorted(found, key=lambda lever: -lever.saves_bytes))
