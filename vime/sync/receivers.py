"""Receivers of the weight sync: placement of the engines' workers, and the experts they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.run.plan import EnginePlan
from vime.sync.parts import Receiver


def receivers_of(
    config: ModelConfig,
    nodes: Sequence[int],
    engines: Sequence[EnginePlan],
    *,
    experts_anywhere: bool = False,
    gpus: Sequence[int] | None = None,
) -> tuple[Receiver, ...]:
    """One receiver for each node with engine workers; with `gpus`, one for each worker that shares a rank's GPU.

    `nodes` and `gpus`: node and GPU slot of every trainer rank. `experts_anywhere`: vLLM places experts by load, so
    every worker gets all. Raises BadInput for a worker on a trainer's node whose GPU has no rank.
    """
    wanted: dict[tuple[int, int | None], list[tuple[int, frozenset[int] | None]]] = {}
    shared = frozenset(nodes) if gpus is not None else frozenset()
    for engine in engines:
        size = engine.tensor_parallel_size * engine.data_parallel_size
        split = engine.expert_parallel and config.moe is not None and not experts_anywhere
        for device, workers in _workers(engine, shared):
            experts = experts_of(workers, size, config.moe.num_experts) if split and config.moe else None
            wanted.setdefault(device, []).append((engine.index, experts))
    found = []
    for turn, ((node, gpu), parts) in enumerate(sorted(wanted.items(), key=lambda item: (item[0][0], item[0][1] or 0))):
        near = tuple(rank for rank, its in enumerate(nodes) if its == node and (gpus is None or gpus[rank] == gpu))
        if gpu is not None and not near:
            raise BadInput(
                f"GPU {gpu} of node {node} has a worker of engine {parts[0][0]} and no trainer rank, but the node has "
                "some: give engines GPUs that they share with the trainer (--colocate), or nodes of their own"
            )
        sets = [experts for _, experts in parts]
        union = None if None in sets else frozenset().union(*(experts for experts in sets if experts is not None))
        # Spread far nodes over publishers, so that one rank does not send to all of them.
        far = (turn * len(nodes) // max(1, len(wanted)),)
        publishers = (near if gpus is None else near[:1]) or far
        index = tuple(index for index, _ in parts)
        found.append(Receiver(node, index, union, publishers, bool(near), gpu, on_gpu=gpus is not None))
    return tuple(found)


def _workers(engine: EnginePlan, shared: Collection[int]) -> Iterator[tuple[tuple[int, int | None], range]]:
    """(device, worker indices) of an engine; a device is (node, GPU slot) on `shared` nodes, else (node, None)."""
    first = 0
    for node, slots in zip(engine.nodes, engine.gpus, strict=True):
        if node in shared:
            for number, slot in enumerate(slots, first):
                yield (node, slot), range(number, number + 1)
        else:
            yield (node, None), range(first, first + len(slots))
        first += len(slots)


def experts_of(workers: range, size: int, experts: int) -> frozenset[int]:
    """Experts of `workers` among an engine's `size` expert-parallel ones: in order, the first get more, as in vLLM."""
    base, more = divmod(experts, size)
    first, last = (worker * base + min(worker, more) for worker in (workers.start, workers.stop))
    return frozenset(range(first, last))
