"""The dependent stages of a run, with their commands, sizes and deadlines."""

from __future__ import annotations

from dataclasses import dataclass

from vime.models.config import ModelConfig
from vime.recipe.flags import flag
from vime.recipe.load import bf16_folder
from vime.recipe.prompt_sources import training_sources
from vime.recipe.schema import Recipe
from vime.run.plan import Artefact, Cluster, Stage

DISK_BYTES_PER_S = 100 * 10**6
"""Lowest rate at which a node reads or writes; deadlines are for stages that hang, not for slow ones."""
CAST_BYTES_A_NODE = 20 * 10**9
REHEARSAL_S = 900.0
"""Seconds for imports from a cold file system, and for a reward server that is away."""
START_S = 300.0
"""Seconds for interpreters, libraries and processes to start on a busy machine."""
ENGINES_S = 1800.0
"""Seconds for engines to start, besides the time that reading the weights takes."""


@dataclass(frozen=True)
class StageInputs:
    """Inputs from which the stages are built."""

    recipe: Recipe
    config: ModelConfig
    cluster: Cluster
    run_dir: str
    nodes: int
    slots_per_node: int
    bf16_bytes: int
    """Bytes of the model's weights in bf16."""
    fp8_bytes: int
    checkpoints_bytes: int
    """Bytes of the newest checkpoints that are kept, and of one more being written."""
    export_like: str | None = None
    """HF folder of the original model, for an evaluation that exports a checkpoint first."""
    teacher_bytes: int = 0
    """Bytes of the teacher's weights."""
    verify_deep: bool = False
    """Compare the full output of cast and conversion, from this or an earlier run, with their inputs."""


def has_cast(job: StageInputs) -> bool:
    """True if a stage makes the bf16 copy."""
    return job.recipe.checkpoint.conversion == "two-stage" and job.config.quantisation is not None


def has_conversion(job: StageInputs) -> bool:
    """True if a stage makes `--ref-load`."""
    return job.recipe.checkpoint.conversion != "direct" and job.recipe.checkpoint.ref_load is not None


def make_stages(job: StageInputs) -> tuple[Stage, ...]:
    """Stages in order, without `ray-workers` on one node, and without cast and convert unless the recipe needs them."""
    stages = [_preflight(job)]
    if job.nodes > 1 and job.cluster.min_network_gbit:
        stages.append(_ring(job))
    stages.append(_rehearsal(job))
    if has_cast(job):
        stages.append(_cast(job))
    if has_conversion(job):
        stages.append(_convert(job))
    if job.verify_deep:
        stages.extend([_verify(stage) for stage in stages if stage.outputs])
    stages.append(_ray(job, "ray-head", (0,)))
    if job.nodes > 1:
        stages.append(_ray(job, "ray-workers", tuple(range(1, job.nodes))))
    stages.extend((_train(job), _report(job)))
    return tuple(stages)


def make_evaluation_stages(job: StageInputs, export_from: Artefact | None) -> tuple[Stage, ...]:
    """Stages of an evaluation: with `export_from`, a torch_dist checkpoint is first written as the HF folder."""
    stages = [_preflight(job)]
    if job.nodes > 1 and job.cluster.min_network_gbit:
        stages.append(_ring(job))
    if export_from is not None:
        stages.append(_export(job, export_from))
    if has_cast(job):
        stages.append(_cast(job))
    stages.append(_ray(job, "ray-head", (0,)))
    if job.nodes > 1:
        stages.append(_ray(job, "ray-workers", tuple(range(1, job.nodes))))
    stages.append(_evaluate(job))
    return tuple(stages)


def _checkpoint(job: StageInputs) -> Artefact:
    quantised = job.config.quantisation is not None
    return Artefact(
        name="hf-checkpoint",
        path=job.recipe.checkpoint.hf_checkpoint or "",
        kind="hf",
        bytes=job.fp8_bytes if quantised else job.bf16_bytes,
    )


def _bf16(job: StageInputs) -> Artefact:
    return Artefact(name="bf16-checkpoint", path=bf16_folder(job.recipe), kind="hf", bytes=job.bf16_bytes)


def _torch_dist(job: StageInputs) -> Artefact:
    return Artefact(
        name="torch-dist", path=job.recipe.checkpoint.ref_load or "", kind="torch_dist", bytes=job.bf16_bytes
    )


def _disk_deadline(nodes: int, *artefacts: Artefact) -> float:
    return START_S + sum(artefact.bytes or 0 for artefact in artefacts) / (nodes * DISK_BYTES_PER_S)


def _preflight(job: StageInputs) -> Stage:
    return Stage(
        name="preflight",
        nodes=tuple(range(job.nodes)),
        command=("-m", "vime.node.preflight", "--run", job.run_dir),
        env=job.recipe.misc.env,
        deadline_s=120.0 + 5.0 * job.nodes,
    )


def _ring(job: StageInputs) -> Stage:
    return Stage(
        name="ring",
        nodes=tuple(range(job.nodes)),
        command=("-m", "vime.node.ring", "--run", job.run_dir),
        env=job.recipe.misc.env,
        tells_end=True,
        deadline_s=START_S,
    )


def _rehearsal(job: StageInputs) -> Stage:
    return Stage(
        name="rehearsal",
        nodes=(0,),
        gpus_per_node=_gpus(job),
        command=("-m", "vime.node.rehearsal", "--run", job.run_dir),
        env=job.recipe.misc.env,
        tells_end=True,
        deadline_s=REHEARSAL_S + job.recipe.rollout.rm_timeout,
    )


def _cast(job: StageInputs) -> Stage:
    source, output = _checkpoint(job), _bf16(job)
    # Ranks share the files; a small checkpoint is finished before a second node has started.
    nodes = min(job.nodes, 1 + job.bf16_bytes // CAST_BYTES_A_NODE)
    # fmt: off
    command = (
        "-m", "vime.checkpoint.cast",
        "--input-fp8-hf-path", source.path,
        "--output-bf16-hf-path", output.path,
    )
    # fmt: on
    return Stage(
        name="cast",
        nodes=tuple(range(nodes)),
        command=command,
        env=job.recipe.misc.env,
        inputs=(source,),
        outputs=(output,),
        deadline_s=_disk_deadline(nodes, source, output),
    )


def _convert(job: StageInputs) -> Stage:
    options = job.recipe.checkpoint
    source, output = _bf16(job) if has_cast(job) else _checkpoint(job), _torch_dist(job)
    layout = {
        "tensor_model_parallel_size": options.convert_tensor_model_parallel_size,
        "pipeline_model_parallel_size": options.convert_pipeline_model_parallel_size,
        "expert_tensor_parallel_size": options.convert_expert_tensor_parallel_size,
        "expert_model_parallel_size": options.convert_expert_model_parallel_size,
        "decoder_first_pipeline_num_layers": options.convert_decoder_first_pipeline_num_layers,
        "decoder_last_pipeline_num_layers": options.convert_decoder_last_pipeline_num_layers,
    }
    sizes = [word for name, value in layout.items() if value is not None for word in (flag(name), str(value))]
    return Stage(
        name="convert",
        nodes=tuple(range(options.convert_num_nodes)),
        tasks_per_node=options.convert_ranks_per_node,
        command=("-m", "vime.checkpoint.convert", *sizes, "--hf-checkpoint", source.path, "--save", output.path),
        env=job.recipe.misc.env,
        inputs=(source,),
        outputs=(output,),
        deadline_s=_disk_deadline(options.convert_num_nodes, source, output),
    )


def _verify(stage: Stage) -> Stage:
    """The stage's work repeated, compared with its output instead of written."""
    return stage.model_copy(
        update={
            "name": f"verify-{stage.name}",
            "command": (*stage.command, "--verify"),
            "inputs": (*stage.inputs, *stage.outputs),
            "outputs": (),
        }
    )


def _gpus(job: StageInputs) -> int:
    return job.slots_per_node if job.cluster.on_gpu else 0


def _ray(job: StageInputs, name: str, nodes: tuple[int, ...]) -> Stage:
    return Stage(
        name=name,
        nodes=nodes,
        gpus_per_node=_gpus(job),
        command=(
            "-m",
            "vime.node.ray_node",
            "--run",
            job.run_dir,
            "--head" if name == "ray-head" else "--worker",
        ),
        env=job.recipe.misc.env,
        service=True,
        # Nodes of a development cluster share two cores, where a raylet takes 3 s.
        deadline_s=120.0 + 10.0 * job.nodes,
    )


def _train(job: StageInputs) -> Stage:
    options, inputs = job.recipe.checkpoint, [_checkpoint(job)]
    if has_conversion(job):
        inputs.append(_torch_dist(job))
    if options.start_from is not None:
        inputs.append(Artefact(name="start", path=options.start_from, kind="hf"))
    if job.recipe.needs_teacher:
        folder = job.recipe.teacher.opd_teacher or ""
        inputs.append(Artefact(name="teacher", path=folder, kind="hf", bytes=job.teacher_bytes))
    for source in training_sources(job.recipe.rollout.prompt_data):
        inputs.append(Artefact(name="prompt-data", path=source.path, kind="data"))
    return Stage(
        name="train",
        nodes=(0,),
        cpus_per_task=1,
        command=("-m", "vime.train", "--run", job.run_dir),
        env=job.recipe.misc.env,
        tells_end=True,
        inputs=tuple(inputs),
        outputs=(Artefact(name="checkpoints", path=options.save or "", kind="run", bytes=job.checkpoints_bytes),),
        # No own deadline: ends with the allocation, and its phases have deadlines.
        deadline_s=job.cluster.time_limit_minutes * 60.0,
    )


def _export(job: StageInputs, source: Artefact) -> Stage:
    original, output = job.recipe.checkpoint.hf_checkpoint or "", _checkpoint(job)
    assert job.export_like is not None
    command = ["-m", "vime.checkpoint.export", "--load", source.path, "--hf-checkpoint", job.export_like]
    command += ["--save", original, *(["--quantise"] if job.config.quantisation else [])]
    return Stage(
        name="export",
        nodes=(0,),
        command=tuple(command),
        env=job.recipe.misc.env,
        inputs=(source,),
        outputs=(output,),
        deadline_s=_disk_deadline(1, source, output),
    )


def _evaluate(job: StageInputs) -> Stage:
    weights = _checkpoint(job)
    return Stage(
        name="evaluate",
        nodes=(0,),
        cpus_per_task=1,
        command=("-m", "vime.train", "--run", job.run_dir),
        env=job.recipe.misc.env,
        tells_end=True,
        inputs=(weights,),
        deadline_s=ENGINES_S + _disk_deadline(job.nodes, weights) + job.recipe.rollout.rollout_timeout,
    )


def _report(job: StageInputs) -> Stage:
    return Stage(
        name="report",
        nodes=(0,),
        cpus_per_task=1,
        command=("-m", "vime.report", job.run_dir),
        needs_services=False,
        env=job.recipe.misc.env,
        deadline_s=START_S,
    )
