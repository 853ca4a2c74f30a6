"""Ports of a run: equal on every node, outside the ephemeral range, distinct from other jobs' on the node.

A run takes one block of consecutive ports. Blocks lie below 9000, since the ephemeral range starts at 32768 on most
Linux systems and at 9000 on some that run containers. Blocks that contain a common service's port are left out.
"""

from __future__ import annotations

from collections import Counter

from vime.errors import BadInput
from vime.planning.layout import EnginePlacement
from vime.run.plan import EnginePlan, Plan, Ports

FIRST, LAST = 2000, 8999
AUX_PORTS = 32
"""Ports for the rendezvous of an engine's own ranks, after its server's port."""
_COMMON_SERVICES = (
    2049, 2181, 2375, 2376, 2379, 2380, 3000, 3128, 3260, 3268, 3306, 3389, 4369, 5000, 5044, 5353, 5432, 5672, 5900,
    5984, 6000, 6006, 6379, 6443, 6817, 6818, 6819, 7077, 7946, 8000, 8008, 8080, 8086, 8265, 8443, 8472, 8500, 8787,
    8888,
)  # fmt: skip
_FIXED = tuple(name for name in Ports.model_fields if not name.startswith("worker_"))


def block_size(gpus_per_node: int, engines: int) -> int:
    """Ports a run needs: one per service, Ray's workers on a node, and each engine's."""
    return len(_FIXED) + _workers(gpus_per_node) + engines * (1 + AUX_PORTS)


def _workers(gpus_per_node: int) -> int:
    # Per GPU a trainer rank and an engine, their helpers, and workers that end late.
    return 24 + 4 * gpus_per_node


def blocks(size: int) -> tuple[int, ...]:
    """First ports of the blocks of this size that contain no common service's port."""
    starts, start = [], FIRST
    while start + size - 1 <= LAST:
        taken = [port for port in _COMMON_SERVICES if start <= port < start + size]
        if taken:
            start = taken[-1] + 1
        else:
            starts.append(start)
            start += size
    if not starts:
        raise BadInput(f"a run with so many engines a node needs {size} consecutive ports: use larger engines")
    return tuple(starts)


def plan_ports(gpus_per_node: int, engines: int) -> Ports:
    """Ports of the first block, for nodes with at most `engines` engines."""
    first = blocks(block_size(gpus_per_node, engines))[0]
    fixed = {name: first + place for place, name in enumerate(_FIXED)}
    worker_first = first + len(_FIXED)
    return Ports(**fixed, worker_first=worker_first, worker_last=worker_first + _workers(gpus_per_node) - 1)


def plan_engines(
    placements: tuple[EnginePlacement, ...], ports: Ports, *, expert_parallel: bool, shared: bool
) -> tuple[EnginePlan, ...]:
    """Engines with their ports: by place on the node, or by index in the run if logical nodes share a host."""
    engines: list[EnginePlan] = []
    for index, placement in enumerate(placements):
        number = index if shared else sum(set(placement.nodes) & set(other.nodes) != set() for other in engines)
        port = ports.worker_last + 1 + number * (1 + AUX_PORTS)
        engines.append(
            EnginePlan(
                index=index,
                nodes=placement.nodes,
                gpus=placement.gpus,
                tensor_parallel_size=placement.tensor_parallel_size,
                data_parallel_size=placement.data_parallel_size,
                expert_parallel=expert_parallel,
                port=port,
                aux_port=port + 1,
            )
        )
    return tuple(engines)


def engines_of_a_host(placements: tuple[EnginePlacement, ...], *, shared: bool) -> int:
    """Largest number of engines whose ports one host must hold."""
    if shared:
        return len(placements)
    return max(Counter(node for placement in placements for node in set(placement.nodes)).values())


def offsets(plan: Plan) -> tuple[int, ...]:
    """Valid values of `Binding.port_offset` for the plan's ports; the first is 0."""
    first = min(getattr(plan.ports, name) for name in Ports.model_fields)
    last = max([plan.ports.worker_last, *(engine.aux_port + AUX_PORTS - 1 for engine in plan.servers)])
    starts = blocks(last - first + 1)
    return tuple(start - starts[0] for start in starts)


def offset_of_job(plan: Plan, job: int) -> int:
    """Port offset of a Slurm job, from its id: jobs with consecutive ids never collide."""
    choices = offsets(plan)
    return choices[job % len(choices)]


def moved(ports: Ports, offset: int) -> Ports:
    """The ports shifted by a binding's offset."""
    return Ports(**{name: port + offset for name, port in ports.model_dump().items()})
