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

    `nodes` and `gpus`: node and GPU slot of every trainer rank. Workers on GPUs of their own receive over a process
    group, on a trainer's node too. `experts_anywhere`: vLLM places experts by load, so every worker gets all. Raises
    BadInput for an engine of which only some workers on a node share a rank's GPU.
    """
    wanted: dict[tuple[int, int | None], list[tuple[int, frozenset[int] | None]]] = {}
    shared = frozenset(zip(nodes, gpus, strict=True)) if gpus is not None else frozenset()
    for engine in engines:
        size = engine.tensor_parallel_size * engine.data_parallel_size
        split = engine.expert_parallel and config.moe is not None and not experts_anywhere
        for device, workers in _workers(engine, shared):
            experts = experts_of(workers, size, config.moe.num_experts) if split and config.moe else None
            wanted.setdefault(device, []).append((engine.index, experts))
    found = []
    for turn, ((node, gpu), parts) in enumerate(sorted(wanted.items(), key=lambda item: (item[0][0], item[0][1] or 0))):
        on_node = tuple(rank for rank, its in enumerate(nodes) if its == node)
        near = on_node if gpus is None else tuple(rank for rank in on_node if gpus[rank] == gpu)
        sets = [experts for _, experts in parts]
        union = None if None in sets else frozenset().union(*(experts for experts in sets if experts is not None))
        # Spread far nodes over publishers, so that one rank does not send to all of them.
        far = on_node[turn % len(on_node) :][:1] if on_node else (turn * len(nodes) // max(1, len(wanted)),)
        publishers = (near if gpus is None else near[:1]) or far
        index = tuple(index for index, _ in parts)
        found.append(Receiver(node, index, union, publishers, bool(near), gpu, on_gpu=gpus is not None))
    return tuple(found)


def _workers(engine: EnginePlan, shared: Collection[tuple[int, int]]) -> Iterator[tuple[tuple[int, int | None], range]]:
    """(device, worker indices) of an engine; a device is (node, GPU slot) if a rank has it too, else (node, None)."""
    first = 0
    for node, slots in zip(engine.nodes, engine.gpus, strict=True):
        alone = [slot for slot in slots if (node, slot) not in shared]
        if len(alone) == len(slots):
            yield (node, None), range(first, first + len(slots))
        elif alone:
            raise BadInput(
                f"engine {engine.index} has workers on GPUs of node {node} that trainer ranks use and on GPU "
                f"{alone[0]}, which none uses: give an engine only shared GPUs (--colocate), or none"
            )
        else:
            for number, slot in enumerate(slots, first):
                yield (node, slot), range(number, number + 1)
        first += len(slots)


def experts_of(workers: range, size: int, experts: int) -> frozenset[int]:
    """Experts of `workers` among an engine's `size` expert-parallel ones: in order, the first get more, as in vLLM."""
    base, more = divmod(experts, size)
    first, last = (worker * base + min(worker, more) for worker in (workers.start, workers.stop))
    return frozenset(range(first, last))
