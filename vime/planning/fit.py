"""Fit of a run to its nodes, and the smallest fitting number of nodes with a layout for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.shards import check_layout
from vime.planning import derive, gpu_memory, layout, memory
from vime.planning.teacher import weights_bytes
from vime.recipe.flags import flag
from vime.recipe.load import change
from vime.recipe.schema import Recipe
from vime.run.plan import Cluster, Plan, TrainerRank

MOST_NODES = 256
MOST_CHANGES = 2
"""Parallel sizes that a layout may change; one that changes more is a different recipe."""
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
          "expert_model_parallel_size")  # fmt: skip


SHARED_GPU = "GPU memory"


@dataclass(frozen=True)
class Shortage:
    """One resource that the plan lacks."""

    where: str
    what: str
    needs_bytes: int
    has_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.where} needs {self.needs_bytes / 1e9:.0f} GB of {self.what} and has {self.has_bytes / 1e9:.0f} GB"
        )


@dataclass(frozen=True)
class Fit:
    """A number of nodes that the run fits on, and the layout to use."""

    nodes: int
    recipe: Recipe
    """The recipe with the fitting layout."""
    flags: tuple[str, ...]
    """Flags to pass after `--` in addition to `--nodes`; empty if the recipe's own layout fits."""
    host_bytes: int
    """Host memory needed on the fullest node."""
    gpu_bytes: int
    """Estimated memory of the fullest training rank's GPU; 0 without GPUs."""


def shortages(plan: Plan) -> tuple[Shortage, ...]:
    """Resources that the plan lacks: host memory of a node (where known), GPU memory of a rank (estimated)."""
    found = []
    has = plan.cluster.memory_per_node_bytes
    fullest = max(plan.nodes, key=lambda node: node.host_memory.total_bytes)
    if has is not None and fullest.host_memory.total_bytes > has:
        found.append(Shortage(f"node {fullest.index}", "host memory", fullest.host_memory.total_bytes, has))
    found += _gpu_shortages((node.index, node.gpu_memory) for node in plan.nodes)
    if plan.teacher is not None and plan.teacher.missing:
        most = max(node.gpu_memory.gpu_bytes for node in plan.nodes if node.gpu_memory is not None)
        needs = most + plan.teacher.missing
        found.append(Shortage("an engine of the teacher", "GPU memory (an estimate)", needs, most))
    return tuple(found)


def _gpu_shortages(nodes: Iterable[tuple[int, Any]]) -> Iterator[Shortage]:
    most = max(
        ((node, gpu) for node, gpu in nodes if gpu is not None),
        key=lambda pair: pair[1].training.total_bytes,
        default=None,
    )
    if most is None:
        return
    node, gpu = most
    if gpu.training.total_bytes > gpu.gpu_bytes:
        what = "GPU memory for training (an estimate)"
        yield Shortage(f"a rank of node {node}", what, gpu.training.total_bytes, gpu.gpu_bytes)
    for moment in gpu.moments:
        # Training is the item above; the other moments are sums of sizes known before the run.
        if moment.name != "training" and moment.bytes > gpu.gpu_bytes:
            where = f"{moment.name} on a GPU that trainer and engine share ({moment.why})"
            yield Shortage(where, SHARED_GPU, moment.bytes, gpu.gpu_bytes)
    if gpu.missing:
        engine = gpu.engine.total_bytes
        yield Shortage("an engine's rank", "GPU memory (an estimate)", engine, engine - gpu.missing)


def least_nodes(recipe: Recipe, config: ModelConfig, cluster: Cluster, *, most: int = MOST_NODES) -> Fit | None:
    """Smallest number of nodes that the run fits on with at most `MOST_CHANGES` parallel sizes changed; None: none.

    Prefers fewer changes, then less host memory. Raises BadInput if the nodes' host memory is unknown.
    """
    if cluster.memory_per_node_bytes is None:
        raise BadInput(
            f"the host memory of a node of cluster {cluster.name} is not known: set memory-per-node-bytes in its "
            "profile or give --node-memory"
        )
    recipe = derive.with_programs(recipe, cluster)
    for nodes in range(1, most + 1):
        if _lower_bound(recipe, config, nodes) > cluster.memory_per_node_bytes:
            continue
        for changes in range(MOST_CHANGES + 1):
            promising = [
                (host, number, each)
                for number, each in enumerate(_variants(recipe, config, nodes, changes))
                if (host := _pure_node(each, config, cluster, nodes)) is not None
            ]
            for _, _, each in sorted(promising, key=lambda one: one[:2]):
                if fit := _try(each, config, cluster, nodes):
                    return Fit(nodes, fit.recipe, _flags(recipe, fit.recipe), fit.host_bytes, fit.gpu_bytes)
    return None


def _lower_bound(recipe: Recipe, config: ModelConfig, nodes: int) -> float:
    """Lower bound over all layouts, in bytes per node: each parameter's optimizer state once."""
    counts = memory.model_counts(config).total
    if recipe.resources.device == "gpu" and not recipe.optimizer.optimizer_cpu_offload:
        return 0
    return (16 if recipe.resources.device == "gpu" else 8) * (counts * 0.9) / nodes


def _variants(recipe: Recipe, config: ModelConfig, nodes: int, changes: int) -> Iterator[Recipe]:
    """The recipe on this many nodes with exactly `changes` parallel sizes changed."""
    per_node = recipe.resources.actor_num_gpus_per_node
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    choices = {
        "tensor_model_parallel_size": [size for size in powers if per_node % size == 0],
        "pipeline_model_parallel_size": [size for size in powers if size <= min(16, config.num_layers)],
        "context_parallel_size": powers[:4],
        "expert_model_parallel_size": [size for size in powers if config.moe and config.moe.num_experts % size == 0],
    }
    now = {name: getattr(recipe.perf, name) for name in _SIZES}
    for names in itertools.combinations(_SIZES, changes):
        for values in itertools.product(*([v for v in choices[name] if v != now[name]] for name in names)):
            perf: dict[str, Any] = {**now, **dict(zip(names, values, strict=True))}
            if "pipeline_model_parallel_size" in names:
                perf |= _ends(config.num_layers, perf["pipeline_model_parallel_size"])
            if perf["tensor_model_parallel_size"] != recipe.perf.tensor_model_parallel_size:
                perf["sequence_parallel"] = perf["tensor_model_parallel_size"] > 1
            yield change(recipe, perf=perf)


def _ends(layers: int, stages: int) -> dict[str, int | None]:
    """First and last stage sizes if the stages do not divide the layers: equal stages, the last one shorter."""
    each = -(-layers // stages)
    last = layers - each * (stages - 1)
    return {
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None if last == each or stages == 1 else last,
    }


def _pure_node(recipe: Recipe, config: ModelConfig, cluster: Cluster, nodes: int) -> int | None:
    """Trainer bytes on a node with only ranks of the heaviest stage; None if they, or a rank's GPU, do not fit.

    A quick filter for most layouts before ranks are placed. A node shared by several stages counts as 0.
    """
    per_node = recipe.resources.actor_num_gpus_per_node
    try:
        recipe = derive.with_nodes(
            recipe, nodes, cluster.gpus_per_node or per_node, one_node=cluster.one_machine and nodes == 1
        )
        trainer = layout.trainer_layout(recipe)
        check_layout(config, trainer)
    except BadInput:
        return None
    weights = memory.Weights.of(recipe, config, trainer)
    if recipe.resources.device == "gpu":
        of_gpu = cluster.gpu_memory_bytes or gpu_memory.DEFAULT_GPU_BYTES
        if any(gpu_memory.training_bytes(recipe, config, weights, stage) > of_gpu for stage in range(trainer.pp)):
            return None
    if trainer.world_size // trainer.pp < per_node:
        return 0
    places = [
        [TrainerRank(rank=0, node=0, gpu=0, tp=0, cp=0, dp=0, pp=pp, ep=0, etp=0, edp=0)] for pp in range(trainer.pp)
    ]
    host = max(memory.node_memory(recipe, config, weights, ranks * per_node, (), 0).total_bytes for ranks in places)
    return host if host <= (cluster.memory_per_node_bytes or 0) else None


def _try(recipe: Recipe, config: ModelConfig, cluster: Cluster, nodes: int) -> Fit | None:
    """The recipe on these nodes, with engines sized to divide them; None if it does not fit."""
    per_node = cluster.gpus_per_node or recipe.resources.actor_num_gpus_per_node
    if recipe.resources.colocate:
        recipe = change(recipe, resources={"rollout_num_gpus": None})
    try:
        recipe = _with_engines(
            derive.with_nodes(recipe, nodes, per_node, one_node=cluster.one_machine and nodes == 1), config
        )
        trainer = layout.trainer_layout(recipe)
        derive.check(recipe, config, trainer)
        check_layout(config, trainer)
        slots = layout.divide_slots(recipe, per_node, one_node=cluster.one_machine and nodes == 1)
        ranks, placements = layout.place_trainer(trainer, slots), layout.place_engines(recipe, slots)
        teaching, teacher_bytes = layout.place_teacher(recipe, slots), weights_bytes(recipe)
    except BadInput:
        # This layout is invalid; another may be valid.
        return None
    if slots.nodes != nodes or (config.vocab_size % trainer.tp and trainer.tp > 1):
        return None
    weights = memory.Weights.of(recipe, config, trainer)
    gpu_bytes = 0
    if recipe.resources.device == "gpu":
        of_gpu = cluster.gpu_memory_bytes or gpu_memory.DEFAULT_GPU_BYTES
        stages = [gpu_memory.stage_memory(recipe, config, weights, stage, of_gpu) for stage in range(trainer.pp)]
        if any(True for _ in _gpu_shortages(enumerate(stages))) or not all(stage.kv_cache_tokens for stage in stages):
            return None
        gpu_bytes = max(stage.training.total_bytes for stage in stages)
    host = 0
    for node in range(nodes):
        mine = [rank for rank in ranks if rank.node == node]
        serving = [placement for placement in placements if node in placement.nodes]
        taught = [placement for placement in teaching if node in placement.nodes]
        held = memory.node_memory(recipe, config, weights, mine, serving, node, taught, teacher_bytes)
        host = max(host, held.total_bytes)
        if host > (cluster.memory_per_node_bytes or 0):
            return None
    return Fit(nodes, recipe, (), host, gpu_bytes)


def _with_engines(recipe: Recipe, config: ModelConfig) -> Recipe:
    """Engines of the recipe's size, or the largest smaller one that divides the GPUs; keeps tensor parallelism."""
    size, (tensor, data) = recipe.engine.rollout_num_gpus_per_engine, gpu_memory.engine_sizes(recipe)
    cluster = recipe.resources
    total = (
        cluster.actor_num_nodes * cluster.actor_num_gpus_per_node
        if cluster.colocate
        else cluster.rollout_num_gpus or size
    )
    if total % size == 0:
        return recipe
    smaller = [number for number in range(min(size, total), 0, -1) if total % number == 0 and number % tensor == 0]
    if not smaller:
        return recipe
    vllm = {**recipe.engine.vllm}
    if data > 1:
        vllm["data_parallel_size"] = smaller[0] // tensor
    return change(recipe, engine={"rollout_num_gpus_per_engine": smaller[0], "vllm": vllm})


def _flags(before: Recipe, after: Recipe) -> tuple[str, ...]:
    """Flags for parallel sizes and engines that turn one recipe into the other."""
    names = (*_SIZES, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    found: list[str] = []
    for name in names:
        old, new = getattr(before.perf, name), getattr(after.perf, name)
        if old != new:
            found += [flag(name), "none" if new is None else str(new)]
    if before.perf.sequence_parallel != after.perf.sequence_parallel:
        found.append("--sequence-parallel" if after.perf.sequence_parallel else "--no-sequence-parallel")
    if before.engine.rollout_num_gpus_per_engine != after.engine.rollout_num_gpus_per_engine:
        found += ["--rollout-num-gpus-per-engine", str(after.engine.rollout_num_gpus_per_engine)]
    data = "data_parallel_size"
    if before.engine.vllm.get(data) != after.engine.vllm.get(data):
        found += ["--vllm-data-parallel-size", str(after.engine.vllm[data])]
    return tuple(found)
