"""Placement of every trainer rank and engine: pure arithmetic over logical nodes and GPU slots."""

from __future__ import annotations

from dataclasses import dataclass

from vime.errors import BadInput
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.run.plan import TrainerRank


@dataclass(frozen=True)
class EnginePlacement:
    """GPUs of one engine, by node, and its parallel sizes."""

    nodes: tuple[int, ...]
    gpus: tuple[tuple[int, ...], ...]
    tensor_parallel_size: int
    data_parallel_size: int


@dataclass(frozen=True)
class Slots:
    """GPU slots as ordered (node, gpu) pairs: `actor` for the trainer, `rollout` for the engines."""

    nodes: int
    gpus_per_node: int
    actor: tuple[tuple[int, int], ...]
    rollout: tuple[tuple[int, int], ...]


def trainer_layout(recipe: Recipe) -> ParallelLayout:
    """The trainer's parallel layout; its world size is the actor's number of GPUs."""
    perf, cluster = recipe.perf, recipe.resources
    return ParallelLayout(
        world_size=cluster.actor_num_nodes * cluster.actor_num_gpus_per_node,
        tp=perf.tensor_model_parallel_size,
        pp=perf.pipeline_model_parallel_size,
        cp=perf.context_parallel_size,
        ep=perf.expert_model_parallel_size,
        etp=perf.expert_tensor_parallel_size,
        sequence_parallel=perf.sequence_parallel,
        first_stage_layers=perf.decoder_first_pipeline_num_layers,
        last_stage_layers=perf.decoder_last_pipeline_num_layers,
    )


def conversion_layout(recipe: Recipe) -> ParallelLayout:
    """Parallel layout of the conversion stage."""
    options = recipe.checkpoint
    return ParallelLayout(
        world_size=options.convert_num_nodes * options.convert_ranks_per_node,
        tp=options.convert_tensor_model_parallel_size,
        pp=options.convert_pipeline_model_parallel_size,
        ep=options.convert_expert_model_parallel_size,
        etp=options.convert_expert_tensor_parallel_size,
        first_stage_layers=options.convert_decoder_first_pipeline_num_layers,
        last_stage_layers=options.convert_decoder_last_pipeline_num_layers,
    )


def divide_slots(recipe: Recipe, gpus_per_node: int, *, one_node: bool = False) -> Slots:
    """Divide the GPU slots between trainer and engines.

    With `--colocate` both use the same slots. Without it, engines have separate nodes after the trainer's, with
    `gpus_per_node` slots on each; on `one_node` they have the slots after the trainer's.
    """
    options = recipe.resources
    actor = tuple(
        (node, gpu) for node in range(options.actor_num_nodes) for gpu in range(options.actor_num_gpus_per_node)
    )
    if options.colocate:
        if options.rollout_num_gpus not in (None, len(actor)):
            raise BadInput(
                f"--rollout-num-gpus is {options.rollout_num_gpus}, but with --colocate engines take the trainer's "
                f"{len(actor)} GPUs: leave it out"
            )
        return Slots(options.actor_num_nodes, options.actor_num_gpus_per_node, actor, actor)
    if not options.rollout_num_gpus:
        raise BadInput("--rollout-num-gpus is not set: give the engines' GPUs, or share the trainer's with --colocate")
    if one_node:
        rollout = tuple((0, len(actor) + number) for number in range(options.rollout_num_gpus))
        return Slots(1, len(actor) + len(rollout), actor, rollout)
    rollout = tuple(
        (options.actor_num_nodes + number // gpus_per_node, number % gpus_per_node)
        for number in range(options.rollout_num_gpus)
    )
    return Slots(rollout[-1][0] + 1, gpus_per_node, actor, rollout)


def place_trainer(layout: ParallelLayout, slots: Slots) -> tuple[TrainerRank, ...]:
    """Assign ranks in order to the trainer's slots; tensor-parallel groups, the fastest dimension, stay in a node."""
    per_node = sum(node == 0 for node, _ in slots.actor)
    if layout.tp > per_node or per_node % layout.tp:
        raise BadInput(
            f"--tensor-model-parallel-size {layout.tp} does not divide the {per_node} GPUs of a node: "
            f"tensor parallelism stays inside a node, use a divisor of {per_node}"
        )
    ranks = []
    for rank, (node, gpu) in enumerate(slots.actor):
        at = layout.coordinates(rank)
        ranks.append(
            TrainerRank(
                rank=rank, node=node, gpu=gpu, tp=at.tp, cp=at.cp, dp=at.dp, pp=at.pp, ep=at.ep, etp=at.etp, edp=at.edp
            )
        )
    return tuple(ranks)


def place_engines(recipe: Recipe, slots: Slots) -> tuple[EnginePlacement, ...]:
    """Assign engines in order to the rollout slots: contiguous nodes, tensor-parallel groups within a node."""
    size = recipe.engine.rollout_num_gpus_per_engine
    data_parallel = recipe.engine.vllm.get("data_parallel_size", 1)
    per_node = sum(node == slots.rollout[0][0] for node, _ in slots.rollout)
    if size < 1 or len(slots.rollout) % size:
        raise BadInput(
            f"--rollout-num-gpus-per-engine {size} does not divide the {len(slots.rollout)} GPUs of all engines"
        )
    if not isinstance(data_parallel, int) or data_parallel < 1 or size % data_parallel:
        raise BadInput(f"--vllm-data-parallel-size {data_parallel} does not divide the {size} GPUs of an engine")
    tensor_parallel = size // data_parallel
    if (size > per_node and size % per_node) or (size <= per_node and per_node % size):
        raise BadInput(f"an engine of {size} GPUs does not fit nodes of {per_node}: use a divisor or a multiple")
    if tensor_parallel > per_node or per_node % tensor_parallel:
        raise BadInput(
            f"an engine of {size} GPUs with --vllm-data-parallel-size {data_parallel} is tensor parallel over "
            f"{tensor_parallel}, more than fits a node of {per_node} GPUs: "
            f"use --vllm-data-parallel-size {max(1, size // per_node)}"
        )
    placements = []
    for first in range(0, len(slots.rollout), size):
        mine = slots.rollout[first : first + size]
        nodes = tuple(sorted({node for node, _ in mine}))
        gpus = tuple(tuple(gpu for node, gpu in mine if node == each) for each in nodes)
        placements.append(EnginePlacement(nodes, gpus, tensor_parallel, data_parallel))
    return tuple(placements)
