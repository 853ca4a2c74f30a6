"""Plan of an evaluation: engines on nodes of their own, without a trainer. Pure, as the rest of planning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.planning import derive, layout, memory, ports, stages
from vime.planning.engines import check_engine
from vime.recipe.load import change
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.run.plan import Artefact, Cluster, Evaluation, NodePlan, Plan, context_length

_OF_A_PARTITION = ("cpus_per_node", "memory_per_node_bytes", "gpus_per_node", "gpu_type")
"""Sizes that belong to the nodes of one partition."""
_MARGIN_S = 300.0
"""Margin of the job's time limit over its stages' deadlines, so that those expire first."""


@dataclass(frozen=True)
class Subject:
    """The weights to evaluate, and where the evaluation's run folder is."""

    evaluation: Evaluation
    run_name: str
    run_dir: str
    hf_config: Mapping[str, Any]
    """`config.json` of the weights."""
    base_dir: str | None = None
    export_from: str | None = None
    """torch_dist checkpoint that becomes `evaluation.weights` first; None: the folder is there."""
    export_like: str | None = None
    """HF folder of the original model, for that export."""


def job_cluster(cluster: Cluster) -> Cluster:
    """The profile with the settings of its `eval-job`. Another partition's node sizes are left open, for the scheduler
    to fill in; jobs that the run itself waited for are no business of its evaluations."""
    own = cluster.eval_job.settings
    extra = {name: value for name, value in cluster.extra_sbatch.items() if name != "dependency"}
    update: dict[str, Any] = {"extra_sbatch": extra, **own}
    if own.get("partition", cluster.partition) != cluster.partition:
        fields = Cluster.model_fields
        update = {name: fields[name].default for name in _OF_A_PARTITION} | update
    return cluster.model_copy(update=update)


def fewest_nodes(recipe: Recipe, gpus_per_node: int) -> int:
    """Nodes of one engine."""
    return max(1, math.ceil(recipe.engine.rollout_num_gpus_per_engine / gpus_per_node))


def fitted_engine(recipe: Recipe, cluster: Cluster, nodes: int) -> tuple[Recipe, int]:
    """The recipe with an engine that fits these nodes, and the GPU slots of a node that engines fill.

    An engine of more GPUs than the job has keeps its tensor-parallel size and loses data-parallel ranks. On processors
    a slot is an engine's share. Raises BadInput if no engine fits.
    """
    size = recipe.engine.rollout_num_gpus_per_engine
    if not cluster.on_gpu:
        return recipe, max(1, math.ceil(size / nodes))
    here, ranks = cluster.gpus_per_node, int(recipe.engine.vllm.get("data_parallel_size", 1))
    if size > nodes * here and not nodes * here % (size // ranks):
        left = nodes * here // (size // ranks)
        vllm = {**recipe.engine.vllm, "data_parallel_size": left}
        return change(recipe, engine={"rollout_num_gpus_per_engine": nodes * here, "vllm": vllm}), here
    whole = here // size * size if size <= here else here
    if not whole or (nodes * whole) % size:
        raise BadInput(
            f"engines of {size} GPUs do not fill {nodes} nodes of {here}: give eval-job other nodes in the cluster "
            "profile (docs/evaluation.md), or --nodes, or --rollout-num-gpus-per-engine"
        )
    return recipe, whole


def evaluation_plan(recipe: Recipe, cluster: Cluster, nodes: int | None, subject: Subject) -> Plan:
    """Plan of an evaluation with the sampling, sets and engines of `recipe`, whose paths are absolute.

    `nodes`: None takes those of the profile's `eval-job`, or as few as an engine needs. Raises BadInput.
    """
    if not recipe.eval.eval_prompt_data:
        raise BadInput("there is nothing to evaluate on: give --eval-prompt-data NAME PATH")
    config, wanted = ModelConfig.from_hf(dict(subject.hf_config)), cluster.eval_job.nodes
    if recipe.resources.device == "cpu":
        cluster = cluster.model_copy(update={"gpus_per_node": 0, "gpu_request": "none"})
    nodes = nodes or wanted or fewest_nodes(recipe, cluster.gpus_per_node if cluster.on_gpu else 2**30)
    recipe, gpus = fitted_engine(recipe, cluster, nodes)
    recipe = _recipe(recipe, config, cluster, nodes, gpus, subject)
    slots = layout.Slots(nodes, gpus, (), tuple((node, gpu) for node in range(nodes) for gpu in range(gpus)))
    placements = layout.place_engines(recipe, slots)
    numbers = ports.plan_ports(gpus, ports.engines_of_a_host(placements, shared=cluster.one_machine))
    parallel = bool(recipe.engine.vllm.get("enable_expert_parallel", False))
    engines = ports.plan_engines(placements, numbers, expert_parallel=parallel, shared=cluster.one_machine)
    for engine in engines:
        check_engine(engine, config.hf, on_gpu=cluster.on_gpu)
    context_length(recipe, config)
    weights = memory.Weights.of(recipe, config, ParallelLayout())
    planned = []
    for node in range(nodes):
        serving = [engine for engine in engines if node in engine.nodes]
        held = memory.node_memory(recipe, config, weights, (), serving, node)
        numbered = tuple(engine.index for engine in serving)
        planned.append(NodePlan(index=node, gpus=gpus, host_memory=held, engines=numbered))
    bf16 = memory.weight_bytes(config, weights, quantised=False)
    job = stages.StageInputs(
        recipe=recipe,
        config=config,
        cluster=cluster,
        run_dir=subject.run_dir,
        nodes=nodes,
        slots_per_node=gpus,
        bf16_bytes=bf16,
        fp8_bytes=memory.weight_bytes(config, weights, quantised=True),
        checkpoints_bytes=0,
        export_like=subject.export_like,
    )
    source = subject.export_from and Artefact(name="checkpoint", path=subject.export_from, kind="torch_dist")
    made = stages.make_evaluation_stages(job, source or None)
    return Plan(
        run_name=subject.run_name,
        run_dir=subject.run_dir,
        base_dir=subject.base_dir,
        recipe=recipe,
        model_config_hf=dict(config.hf),
        cluster=_limited(cluster, sum(stage.deadline_s for stage in made)),
        layout=ParallelLayout(),
        nodes=tuple(planned),
        trainer_ranks=(),
        engines=engines,
        ports=numbers,
        stages=made,
        evaluation=subject.evaluation,
        signal_lead_s=60,
    )


def _limited(cluster: Cluster, seconds: float) -> Cluster:
    """The cluster with the time limit that the profile gives to evaluations, or the job's deadlines need."""
    minutes = math.ceil((seconds + _MARGIN_S) / 60)
    limit = cluster.eval_job.time_limit_minutes or min(minutes, cluster.time_limit_minutes)
    return cluster.model_copy(update={"time_limit_minutes": limit})


def _recipe(recipe: Recipe, config: ModelConfig, cluster: Cluster, nodes: int, gpus: int, subject: Subject) -> Recipe:
    """The recipe of the evaluation: its engines take all slots, and nothing is trained, saved or converted."""
    casts = config.quantisation is not None and not cluster.on_gpu
    kept = dict.fromkeys(("ref_load", "load", "start_from", "save_hf", "save_interval"))
    checkpoint = {
        **kept, "hf_checkpoint": subject.evaluation.weights, "conversion": "two-stage" if casts else "direct",
    }  # fmt: skip
    resources = {"actor_num_nodes": nodes, "actor_num_gpus_per_node": gpus}
    resources |= {"colocate": False, "rollout_num_gpus": nodes * gpus}
    evaluation = {"eval_job": False, "eval_interval": None}
    recipe = change(recipe, checkpoint=checkpoint, resources=resources, eval=evaluation)
    whole = cluster.cpus_per_node if cluster.exclusive else None
    return derive.with_programs(derive.derive(recipe, config, ParallelLayout(), subject.run_dir, whole), cluster)
