"""Building a Plan from a recipe, a cluster and a number of nodes."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vime.data.check import check_prompt_data
from vime.errors import BadInput
from vime.models.arguments import check_model_args
from vime.models.config import ModelConfig
from vime.models.folder import check_kind, check_names, check_quantisation, check_tokenizer, fitted, tensor_names
from vime.models.scales import check_scales
from vime.models.shards import check_layout
from vime.planning import derive, gpu_memory, gpu_moments, layout, memory, ports, stages, teacher
from vime.planning.engines import check_engine
from vime.planning.fit import MOST_NODES, Fit, least_nodes
from vime.planning.inputs import check_shards, read_json
from vime.planning.plugins import check_plugins
from vime.planning.subject import preview as evaluation_preview
from vime.planning.teaching import teaching_notes
from vime.recipe import files
from vime.recipe.load import absolute_path, change, uses_base_dir, with_absolute_paths
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.recipe.vllm_arguments import check_installed
from vime.run.plan import Cluster, EnginePlan, GpuMemory, NodePlan, Plan, Ports, TeacherPlan, TrainerRank
from vime.run.profiles import check_report_path

SAVE_BYTES_PER_S = 500 * 10**6
"""Bytes/s that a node saves to a shared file system; sets the lead of the signal before the time limit."""

SCALES = 256
"""Scales of a checkpoint whose values a plan reads; the rehearsal on a node reads all."""

MIN_NETWORK_GBIT = 1.0
"""Rate in Gbit/s that any network between GPU nodes reaches over TCP; below it, something is broken."""


@dataclass(frozen=True)
class Checks:
    """On-disk checks that make_plan runs; a dry run skips them all."""

    inputs: bool = True
    """Require base folder, checkpoint and data to exist and be complete."""
    run_folder: bool = True
    """Require the run folder to be writable."""


def make_plan(
    recipe: Recipe,
    *,
    cluster: Cluster,
    nodes: int | None = None,
    base_dir: str | os.PathLike[str] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    runs_dir: str | os.PathLike[str] | None = None,
    run_name: str | None = None,
    shape: Literal["allocation", "chain"] = "allocation",
    spares: int = 0,
    verify_deep: bool = False,
    checks: Checks | None = None,
) -> Plan:
    """Plan a run. Writes nothing; of the checkpoint, reads only config.json and the shard headers.

    The run folder is `run_dir`, or the run's name in `runs_dir` (by default `$BASE_DIR/runs`). Raises BadInput.
    """
    checks = checks or Checks()
    base = str(Path(base_dir).expanduser().absolute()) if base_dir is not None else cluster.base_dir
    run_name, folder = _run_folder(recipe, base, run_dir, runs_dir, run_name)
    found = _check_base_dir(recipe, base, required=checks.inputs)
    if checks.run_folder:
        check_writable(Path(folder))
    recipe, direct = _direct_start(with_absolute_paths(recipe, base))
    found += direct
    config, note = _model(recipe, required=checks.inputs)
    found += note
    check_model_args(config, recipe.model.model_args)
    if checks.inputs:
        check_installed(recipe.engine.vllm)
    found += check_plugins(recipe, required=checks.inputs and cluster.container is None and not cluster.interpreter)
    found += check_prompt_data(recipe, required=checks.inputs)
    found += teaching_notes(recipe)

    one_node = cluster.one_machine and (recipe.resources.actor_num_nodes if nodes is None else nodes) == 1
    cluster = _with_devices(cluster, recipe)
    per_node = _gpus_per_node(recipe, cluster)
    recipe = derive.with_nodes(recipe, nodes, per_node, one_node=one_node)
    trainer = layout.trainer_layout(recipe)
    derive.check(recipe, config, trainer)
    check_report_path(recipe, folder)
    taught, told = teacher.look(recipe, config, required=checks.inputs, on_gpu=cluster.on_gpu)
    found += told
    recipe = teacher.with_defaults(recipe, taught, layout.teacher_gpus(recipe), on_gpu=cluster.on_gpu)
    check_layout(config, trainer)
    found += derive.notes(recipe, config, trainer)
    recipe = derive.derive(recipe, config, trainer, folder, cluster.cpus_per_node if cluster.exclusive else None)
    recipe = derive.with_programs(recipe, cluster)
    slots = layout.divide_slots(recipe, per_node, one_node=one_node)
    ranks, engines, teaching, numbers = _place(recipe, cluster, trainer, slots)
    for engine in engines:
        check_engine(engine, config.hf, on_gpu=cluster.on_gpu)
    for engine in teaching:
        check_engine(engine, taught.hf_config if taught else {}, on_gpu=cluster.on_gpu)
    _check_conversion(recipe, config, slots.nodes)

    weights = memory.Weights.of(recipe, config, trainer)
    recipe = gpu_moments.with_share(recipe, config, weights, _bytes_of_gpu(cluster))
    gpus = _gpu_memory(recipe, config, cluster, weights)
    teaches = None if taught is None else _teacher(recipe, taught, teaching, cluster)
    planned = tuple(
        _node(node, recipe, config, weights, slots, ranks, engines, teaches, gpus) for node in range(slots.nodes)
    )
    job = stages.StageInputs(
        recipe=recipe,
        config=config,
        cluster=cluster,
        run_dir=folder,
        nodes=slots.nodes,
        slots_per_node=slots.gpus_per_node,
        bf16_bytes=memory.weight_bytes(config, weights, quantised=False),
        fp8_bytes=memory.weight_bytes(config, weights, quantised=True),
        checkpoints_bytes=(recipe.checkpoint.save_keep + 1) * memory.checkpoint_bytes(recipe, weights),
        verify_deep=verify_deep,
        teacher_bytes=taught.weights_bytes if taught else 0,
    )
    plan = Plan(
        run_name=run_name,
        run_dir=folder,
        base_dir=base,
        shape=shape,
        recipe=recipe,
        model_config_hf=dict(config.hf),
        cluster=cluster,
        layout=trainer,
        spares=spares,
        nodes=planned,
        trainer_ranks=ranks,
        engines=engines,
        teacher=teaches,
        ports=numbers,
        stages=stages.make_stages(job),
        signal_lead_s=_signal_lead(recipe, weights, slots.nodes, cluster),
        notes=tuple(found),
    )
    return plan if not recipe.eval.eval_job else _with_evaluations(plan)


def _with_evaluations(plan: Plan) -> Plan:
    """The plan with a note about the jobs of `--eval-job`. Raises BadInput for jobs that cannot be planned."""
    if plan.cluster.one_machine and plan.on_gpu:
        raise BadInput("--eval-job with --cluster local: this machine's GPUs are the run's own, leave it out")
    job = evaluation_preview(plan)
    gpus = f" of {job.nodes[0].gpus} GPUs" if job.on_gpu else ""
    where = f", partition {job.cluster.partition}" if job.cluster.partition else ""
    note = (
        f"each evaluation is a job of {len(job.nodes)} nodes{gpus}{where}, at most {job.cluster.time_limit_minutes} min"
    )
    return plan.model_copy(update={"notes": (*plan.notes, note)})


def fewest_nodes(recipe: Recipe, cluster: Cluster, base_dir: str | os.PathLike[str] | None, *, required: bool) -> Fit:
    """Smallest number of the cluster's nodes that the recipe fits on. Raises BadInput if none does."""
    base = str(Path(base_dir).expanduser().absolute()) if base_dir is not None else cluster.base_dir
    config, _ = _model(with_absolute_paths(recipe, base), required=required)
    cluster = _with_devices(cluster, recipe)
    found = least_nodes(recipe, config, cluster)
    if found is None:
        raise BadInput(
            f"--nodes auto: nothing up to {MOST_NODES} nodes of {(cluster.memory_per_node_bytes or 0) / 1e9:.0f} GB "
            "fits: look at python -m vime.plan for what would help"
        )
    return found


def _run_folder(
    recipe: Recipe,
    base: str | None,
    run_dir: str | os.PathLike[str] | None,
    runs_dir: str | os.PathLike[str] | None,
    run_name: str | None,
) -> tuple[str, str]:
    """Name and absolute folder of the run."""
    if run_name is not None and (
        not run_name or run_name in (".", "..") or "/" in run_name or not run_name.isprintable()
    ):
        raise BadInput(f"--run-name is {run_name!r}: give a name that can be a folder's")
    if run_dir is not None:
        folder = absolute_path(str(run_dir), base)
        return run_name or os.path.basename(folder), folder
    name = run_name or f"{recipe.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return name, absolute_path(os.path.join(str(runs_dir or "$BASE_DIR/runs"), name), base)


def _check_base_dir(recipe: Recipe, base: str | None, *, required: bool) -> list[str]:
    if base is None:
        if (needs := uses_base_dir(recipe)) is None:
            return []
        message = f"$BASE_DIR is not set, and {needs} needs it: give --base-dir, or set it in the environment"
        if required:
            raise BadInput(message)
        return [message]
    if required and not os.path.isdir(base):
        raise BadInput(f"$BASE_DIR is {base}, which is not a folder: give the shared folder of models and data")
    return []


def check_writable(folder: Path) -> None:
    """Raise BadInput if the run folder cannot be created or written."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise BadInput(f"run folder {folder}: {place} is not a folder, give another with --run-dir")
    if not os.access(place, os.W_OK | os.X_OK) or os.statvfs(place).f_flag & os.ST_RDONLY:
        raise BadInput(f"run folder {folder}: {place} cannot be written, give another with --run-dir")


def _direct_start(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Start directly from `--load` of an HF folder, unconverted; checkpoints are saved to and resumed from `--save`."""
    start, load = recipe.checkpoint.start_from, recipe.checkpoint.load
    if load is not None and (Path(load) / "config.json").is_file():
        start, load = load, None
    if start is None:
        return recipe, []
    check_shards(start)
    changed = change(recipe, checkpoint={"start_from": start, "load": load, "conversion": "direct"})
    return changed, [f"training starts from the HF folder {start}, without a conversion"]


def _model(recipe: Recipe, *, required: bool) -> tuple[ModelConfig, list[str]]:
    """The checkpoint's config, or one from `configs/models/` if no checkpoint is there and none is required."""
    folder = recipe.checkpoint.hf_checkpoint
    if folder is None:
        raise BadInput("--hf-checkpoint is not set: give the folder of the HF checkpoint")
    if required or (Path(folder) / "config.json").is_file():
        hf = read_json(Path(folder) / "config.json")
        ModelConfig.from_hf(hf)
        if required:
            check_shards(folder)
        check_kind(Path(folder))
        names = tensor_names(Path(folder))
        check_names(Path(folder), names)
        check_quantisation(Path(folder), hf, names)
        check_scales(Path(folder), quantised=bool(hf.get("quantization_config")), most=SCALES)
        check_tokenizer(Path(folder), trust_remote_code=recipe.checkpoint.trust_remote_code)
        hf, notes = fitted(hf, names)
        return ModelConfig.from_hf(hf), notes
    if recipe.model.model is None:
        raise BadInput(f"there is no {folder}/config.json: give --hf-checkpoint, or --model to plan without one")
    hf = files.read(files.find("models", recipe.model.model))
    note = f"planned from configs/models/{recipe.model.model}.yaml: there is no {folder}/config.json here"
    return ModelConfig.from_hf(hf), [note]


def _with_devices(cluster: Cluster, recipe: Recipe) -> Cluster:
    """The cluster as the recipe's device sees it: no GPUs for `cpu`; on this machine, those that `gpu` takes."""
    if recipe.resources.device == "cpu":
        return cluster.model_copy(update={"gpus_per_node": 0, "gpu_request": "none"})
    if cluster.min_network_gbit is None and not cluster.one_machine:
        cluster = cluster.model_copy(update={"min_network_gbit": MIN_NETWORK_GBIT})
    if cluster.one_machine and not cluster.gpus_per_node:
        resources = recipe.resources
        wanted = resources.actor_num_gpus_per_node + (0 if resources.colocate else resources.rollout_num_gpus or 0)
        wanted += layout.teacher_gpus(recipe)
        return cluster.model_copy(update={"gpus_per_node": wanted, "gpu_request": "gpus-per-node"})
    return cluster


def _gpus_per_node(recipe: Recipe, cluster: Cluster) -> int:
    """GPU slots per node for engines not colocated; raises BadInput if the trainer's do not fit a node."""
    wanted, present = recipe.resources.actor_num_gpus_per_node, cluster.gpus_per_node
    if wanted < 1 or recipe.resources.actor_num_nodes < 1:
        raise BadInput("--actor-num-nodes and --actor-num-gpus-per-node are at least 1")
    if not cluster.on_gpu:
        return wanted
    if wanted > present:
        raise BadInput(
            f"--actor-num-gpus-per-node is {wanted}, but nodes of cluster {cluster.name} have {present} GPUs: "
            f"give at most {present}"
        )
    return present


def _place(
    recipe: Recipe, cluster: Cluster, trainer: ParallelLayout, slots: layout.Slots
) -> tuple[tuple[TrainerRank, ...], tuple[EnginePlan, ...], tuple[EnginePlan, ...], Ports]:
    """Trainer ranks, engines, engines of the teacher, and the ports of all."""
    ranks = layout.place_trainer(trainer, slots)
    engines, teaching = layout.place_engines(recipe, slots), layout.place_teacher(recipe, slots)
    placements, shared = (*engines, *teaching), cluster.one_machine
    numbers = ports.plan_ports(slots.gpus_per_node, ports.engines_of_a_host(placements, shared=shared))
    expert_parallel = bool(recipe.engine.vllm.get("enable_expert_parallel", False))
    servers = ports.plan_engines(placements, numbers, expert_parallel=expert_parallel, shared=shared)
    experts = {"expert_parallel": bool(recipe.teacher.opd_teacher_vllm.get("enable_expert_parallel", False))}
    teachers = tuple(engine.model_copy(update=experts) for engine in servers[len(engines) :])
    return ranks, servers[: len(engines)], teachers, numbers


def _teacher(recipe: Recipe, taught: teacher.Teacher, engines: tuple[EnginePlan, ...], cluster: Cluster) -> TeacherPlan:
    memory, missing = None, 0
    if cluster.on_gpu:
        memory, missing = teacher.gpu_memory(recipe, taught, engines[0], _bytes_of_gpu(cluster))
    return TeacherPlan(
        path=taught.path,
        weights_bytes=taught.weights_bytes,
        max_model_len=recipe.teacher.opd_teacher_vllm["max_model_len"],
        engines=engines,
        gpu_memory=memory,
        missing=missing,
    )


def _check_conversion(recipe: Recipe, config: ModelConfig, nodes: int) -> None:
    options = recipe.checkpoint
    if options.conversion == "direct" or options.ref_load is None:
        return
    if options.convert_num_nodes > nodes:
        raise BadInput(
            f"--convert-num-nodes is {options.convert_num_nodes}, but the run has {nodes} nodes: "
            "give fewer with a conversion layout that fits, or --conversion direct"
        )
    check_layout(config, layout.conversion_layout(recipe))


def _node(
    node: int,
    recipe: Recipe,
    config: ModelConfig,
    weights: memory.Weights,
    slots: layout.Slots,
    ranks: tuple[TrainerRank, ...],
    engines: tuple[EnginePlan, ...],
    taught: TeacherPlan | None,
    gpus: tuple[GpuMemory, ...],
) -> NodePlan:
    mine = [rank for rank in ranks if rank.node == node]
    stages = [gpus[rank.pp] for rank in mine] if gpus else []
    serving = [engine for engine in engines if node in engine.nodes]
    teaching = [engine for engine in taught.engines if node in engine.nodes] if taught else []
    size = taught.weights_bytes if taught else 0
    return NodePlan(
        index=node,
        gpus=slots.gpus_per_node,
        host_memory=memory.node_memory(recipe, config, weights, mine, serving, node, teaching, size),
        gpu_memory=max(stages, key=lambda stage: stage.training.total_bytes, default=None),
        ranks=tuple(rank.rank for rank in mine),
        engines=tuple(engine.index for engine in (*serving, *teaching)),
    )


def _gpu_memory(
    recipe: Recipe, config: ModelConfig, cluster: Cluster, weights: memory.Weights
) -> tuple[GpuMemory, ...]:
    """Estimate per pipeline stage; empty without GPUs."""
    if recipe.resources.device != "gpu":
        return ()
    of_gpu, found = _bytes_of_gpu(cluster), []
    for stage in range(weights.layout.pp):
        alone = gpu_memory.stage_memory(recipe, config, weights, stage, of_gpu)
        together = gpu_moments.moments(recipe, config, weights, stage, of_gpu)
        found.append(alone.model_copy(update={"moments": together}))
    return tuple(found)


def _bytes_of_gpu(cluster: Cluster) -> int:
    return cluster.gpu_memory_bytes or gpu_memory.DEFAULT_GPU_BYTES


def _signal_lead(recipe: Recipe, weights: memory.Weights, nodes: int, cluster: Cluster) -> int:
    """Seconds to finish a step and write a checkpoint, at most a quarter of the time limit."""
    save = memory.checkpoint_bytes(recipe, weights) / (nodes * SAVE_BYTES_PER_S)
    return int(min(120 + 1.5 * save, cluster.time_limit_minutes * 60 / 4))
