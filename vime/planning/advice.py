"""What would bring a node's host memory down, by how much; and the R1 recipe against what its document says."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass

from vime.planning.memory import ALLOCATOR_SETTINGS
from vime.run.plan import Memory, NodePlan, Plan

GB = 10**9
DOCUMENT_TOTAL = (1400 * GB, 1500 * GB)
"""Host memory a node of the 128-GPU recipe by its document, which gives no items."""


@dataclass(frozen=True)
class Lever:
    """One way to need less on the fullest node."""

    saves_bytes: int
    what: str
    how: str
    """The flags to give, or `not built` where vime has no such option yet."""


@dataclass(frozen=True)
class Difference:
    """One item of the published account of the recipe's heavy nodes beside vime's."""

    item: str
    theirs: int
    ours: int
    why: str

    @property
    def bytes(self) -> int:
        return self.ours - self.theirs


_PUBLISHED: tuple[tuple[str, tuple[str, ...], int, str], ...] = (
    ("CPU Adam", ("cpu_adam",), 736,
     "eight copies of the latent down-projections, which tensor parallelism does not cut, are counted"),
    ("pinned rounding", ("pinned_rounding", "backup_rounding"), 53,
     "of gradients, reference and weights backup, from the sizes of the tensors and buffers"),
    ("backup of weights and gradients", ("weights_backup",), 293,
     "gradients are dropped while the engine runs, since every step starts from zero"),
    ("actor and reference copies", ("reference_copy",), 223,
     "one copy: the reference is exchanged with the live weights, so the actor needs no second one"),
    ("engine sleep copy", ("engine_sleep_copy",), 84, "MTP layer included"),
    ("processes and Ray", ("trainer_processes", "engine_processes", "ray"), 90, "80 to 100 GB there"),
)  # fmt: skip
"""Item, vime's items, GB on a heavy node (46.0 B parameters), and where a difference comes from."""


def fullest(plan: Plan) -> NodePlan:
    """The node that needs most host memory."""
    return max(plan.nodes, key=lambda node: node.host_memory.total_bytes)


def is_documented(plan: Plan) -> bool:
    """Whether the plan is the documented recipe: DeepSeek-R1 on 16 nodes of 8 GPUs as TP8, PP4, CP4, EP32."""
    layout = plan.layout
    sizes = (layout.world_size, layout.tp, layout.pp, layout.cp, layout.ep, layout.etp)
    return plan.recipe.model.model == "deepseek-r1" and sizes == (128, 8, 4, 4, 32, 1)


def against_document(plan: Plan) -> tuple[Difference, ...]:
    """The fullest node item by item against the published account; empty for any other recipe."""
    if not is_documented(plan):
        return ()
    ours = _by_name(fullest(plan).host_memory)
    return tuple(
        Difference(item, theirs * GB, sum(ours.get(name, 0) for name in names), why)
        for item, names, theirs, why in _PUBLISHED
    )


def levers(plan: Plan) -> tuple[Lever, ...]:
    """Ways to need less on the fullest node, the largest first; the savings add up."""
    recipe = plan.recipe
    items = {item.name: item for item in fullest(plan).host_memory.items}
    found = []

    def add(names: tuple[str, ...], what: str, how: str) -> None:
        if size := sum(items[name].bytes for name in names if name in items):
            found.append(Lever(size, what, how))

    if recipe.resources.device == "gpu":
        add(("engine_sleep_copy",), "put engines to sleep without their weights: the sync brings them", "not built")
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


def _by_name(memory: Memory) -> dict[str, int]:
    return {item.name: item.bytes for item in memory.items}
