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
    """GPU slots as ordered (node, gpu) pairs: `actor` for the trainer, `rollout` for the engines, `teacher` for the
    engines of the teacher."""

    nodes: int
    gpus_per_node: int
    actor: tuple[tuple[int, int], ...]
    rollout: tuple[tuple[int, int], ...]
    teacher: tuple[tuple[int, int], ...] = ()


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


def teacher_gpus(recipe: Recipe) -> int:
    """GPUs of all engines of the teacher; 0 without one."""
    options = recipe.teacher
    return (options.opd_teacher_num_gpus or options.opd_teacher_num_gpus_per_engine) if recipe.needs_teacher else 0


def nodes_apart(recipe: Recipe, gpus_per_node: int) -> int:
    """Nodes that engines and teacher take besides the trainer's."""
    engines = 0 if recipe.resources.colocate else recipe.resources.rollout_num_gpus or 0
    teacher = teacher_gpus(recipe)
    return -(-(_aligned(engines, recipe, gpus_per_node) + teacher if teacher else engines) // gpus_per_node)


def _aligned(taken: int, recipe: Recipe, gpus_per_node: int) -> int:
    """First slot after `taken` ones where an engine of the teacher neither crosses nodes nor begins inside one."""
    unit = min(recipe.teacher.opd_teacher_num_gpus_per_engine, gpus_per_node)
    return -(-taken // unit) * unit


def divide_slots(recipe: Recipe, gpus_per_node: int, *, one_node: bool = False) -> Slots:
    """Divide the GPU slots between trainer, engines and teacher.

    With `--colocate` trainer and engines use the same slots. Without it, engines have separate nodes after the
    trainer's, with `gpus_per_node` slots on each; on `one_node` they have the slots after the trainer's. The teacher
    always has slots of its own, after all others.
    """
    slots = _trainer_and_engines(recipe, gpus_per_node, one_node)
    count = teacher_gpus(recipe)
    if not count:
        return slots
    if one_node and slots.nodes == 1:
        teacher = tuple((0, slots.gpus_per_node + number) for number in range(count))
        return Slots(1, slots.gpus_per_node + count, slots.actor, slots.rollout, teacher)
    trainer = recipe.resources.actor_num_nodes
    first = 0 if recipe.resources.colocate else _aligned(len(slots.rollout), recipe, gpus_per_node)
    teacher = tuple(
        (trainer + number // gpus_per_node, number % gpus_per_node) for number in range(first, first + count)
    )
    per_node = max(gpus_per_node, slots.gpus_per_node)
    return Slots(teacher[-1][0] + 1, per_node, slots.actor, slots.rollout, teacher)


def _trainer_and_engines(recipe: Recipe, gpus_per_node: int, one_node: bool) -> Slots:
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
    per_node = sum(node == slots.rollout[0][0] for node, _ in slots.rollout)
    if size < 1 or len(slots.rollout) % size:
        raise BadInput(
            f"--rollout-num-gpus-per-engine {size} does not divide the {len(slots.rollout)} GPUs of all engines"
        )
    data_parallel = recipe.engine.vllm.get("data_parallel_size", 1)
    return _placed(slots.rollout, size, per_node, data_parallel, "an engine", "--vllm-data-parallel-size")


def place_teacher(recipe: Recipe, slots: Slots) -> tuple[EnginePlacement, ...]:
    """Assign the teacher's engines to its slots, as `place_engines` does; none without a teacher."""
    if not slots.teacher:
        return ()
    size, option = recipe.teacher.opd_teacher_num_gpus_per_engine, "data_parallel_size of --opd-teacher-vllm:"
    if len(slots.teacher) % size:
        raise BadInput(
            f"--opd-teacher-num-gpus-per-engine {size} does not divide the {len(slots.teacher)} GPUs of "
            "--opd-teacher-num-gpus"
        )
    per_node = len(slots.teacher) if slots.nodes == 1 else slots.gpus_per_node
    data_parallel = recipe.teacher.opd_teacher_vllm.get("data_parallel_size", 1)
    return _placed(slots.teacher, size, per_node, data_parallel, "an engine of the teacher", option)


def _placed(
    slots: tuple[tuple[int, int], ...], size: int, per_node: int, data_parallel: object, what: str, option: str
) -> tuple[EnginePlacement, ...]:
    """Engines of `size` GPUs on these slots. `option` sets the data-parallel size."""
    if not isinstance(data_parallel, int) or data_parallel < 1 or size % data_parallel:
        raise BadInput(f"{option} {data_parallel} does not divide the {size} GPUs of {what}")
    tensor_parallel = size // data_parallel
    if (size > per_node and size % per_node) or (size <= per_node and per_node % size):
        raise BadInput(f"{what} of {size} GPUs does not fit nodes of {per_node}: use a divisor or a multiple")
    if tensor_parallel > per_node or per_node % tensor_parallel:
        raise BadInput(
            f"{what} of {size} GPUs with {option} {data_parallel} is tensor parallel over "
            f"{tensor_parallel}, more than fits a node of {per_node} GPUs: "
            f"use {option} {max(1, size // per_node)}"
        )
    placements = []
    for first in range(0, len(slots), size):
        mine = slots[first : first + size]
        nodes = tuple(sorted({node for node, _ in mine}))
        gpus = tuple(tuple(gpu for node, gpu in mine if node == each) for each in nodes)
        placements.append(EnginePlacement(nodes, gpus, tensor_parallel, data_parallel))
    return tuple(placements)
