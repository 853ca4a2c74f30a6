"""Mapping of a logical node's slots to the host's GPUs, as CUDA's environment variables."""

from __future__ import annotations

from collections.abc import Iterable

from vime.errors import BadInput
from vime.run.plan import Plan

VISIBLE = "VIME_VISIBLE_GPUS"
"""Environment variable with the original CUDA_VISIBLE_DEVICES of a local run's caller, since Ray changes that one."""


def node_slots(plan: Plan, node: int) -> tuple[int, ...]:
    """Slots of a node that trainer ranks or engines use."""
    used = {rank.gpu for rank in plan.trainer_ranks if rank.node == node}
    for engine in plan.servers:
        if node in engine.nodes:
            used.update(engine.gpus[engine.nodes.index(node)])
    return tuple(sorted(used))


def device_variables(slots: Iterable[int], visible: str | None) -> dict[str, str]:
    """CUDA's variables for a process on these slots; `visible`: the caller's devices, None or empty: all.

    Raises BadInput if `visible` has too few.
    """
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    numbers = tuple(slots)
    if names and max(numbers) >= len(names):
        raise BadInput(
            f"the run takes {max(numbers) + 1} GPUs, and CUDA_VISIBLE_DEVICES={visible} leaves {len(names)}: name more"
        )
    chosen = [names[number] if names else str(number) for number in numbers]
    # Bus order, as in nvidia-smi and preflight; CUDA's default order is by speed.
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(chosen)}
