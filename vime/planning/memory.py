"""Host memory of a node, item by item: the trainer, the engines, Ray and programs of tools, each with its reason.

Sizes follow from parameter counts and the recipe; fixed process overheads are the constants below.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from vime.models.config import ModelConfig
from vime.planning.counts import Counts, Tensors, model_counts, stage_counts, stage_tensors
from vime.recipe.optimizers import OptimizerKind
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.run.cores import programs_at_once
from vime.run.plan import Item, Memory, TrainerRank

GB = 10**9
GPU_PROCESS, GPU_ENGINE_PROCESS = 5 * GB, 5 * GB
"""Host memory of a process with a CUDA context, NCCL and its libraries."""
GPU_ENGINE_ASLEEP = 1 * GB
"""Host memory of vLLM in a process that sleeps at level 2: the model's buffers and the CUDA graphs' memory."""
CPU_TRAINER_PROCESS, CPU_ENGINE_PROCESS = 900 * 10**6, 1_500 * 10**6
EXPORT_PROCESS, EXPORT_COPIES = 900 * 10**6, 8
"""Host memory of the process that exports checkpoints: its libraries, and bytes per parameter of the largest tensor."""
PROFILE_EVENTS, PROFILE_EVENT_BYTES = 1500, 2000
"""Events of torch's profiler for a layer and a micro-batch, forward and backward, and host memory of one, with the
trace that is written from it."""
PROFILE_PROCESS = 10**9
"""Buffers of the profiler."""
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that configure torch's allocators; the first is the newer name."""
RAY_NODE = 400 * 10**6
"""Raylet, agents and idle workers of a node."""


class EngineGpus(Protocol):
    """Placement of an engine: its GPUs by node."""

    @property
    def nodes(self) -> tuple[int, ...]: ...
    @property
    def gpus(self) -> tuple[tuple[int, ...], ...]: ...


@dataclass(frozen=True)
class Weights:
    """Parameter counts of the trainer's stages and of the whole model."""

    layout: ParallelLayout
    stages: tuple[Counts, ...]
    """Trainer stages, without frozen MTP layers, which the weight sync reads from the checkpoint."""
    tensors: tuple[tuple[Tensors, ...], ...]
    """Trainer stages, tensor by tensor."""
    model: Counts
    """The model as HF checkpoints and engines hold it, with MTP layers."""
    trained: Counts
    """The trainer's model over all ranks, each parameter once."""

    @classmethod
    def of(cls, recipe: Recipe, config: ModelConfig, layout: ParallelLayout) -> Weights:
        mtp = recipe.model.mtp_num_layers > 0
        return cls(
            layout,
            stage_counts(config, layout, mtp=mtp),
            stage_tensors(config, layout, mtp=mtp),
            model_counts(config),
            stage_counts(config, ParallelLayout(), mtp=mtp)[0],
        )


@dataclass(frozen=True)
class _Held:
    """Elements and rounding losses on one node."""

    ranks: int
    held: int
    """Parameters of all ranks on the node."""
    kept: int
    """Parameters whose optimizer state is kept on the node."""
    rounding_4: int
    """Bytes lost to rounding if each optimizer shard is a pinned fp32 buffer."""
    rounding_2: int
    """Bytes lost to rounding if each parameter is a pinned bf16 buffer."""
    rounding_buffers: int
    """Bytes lost to rounding if Megatron's bf16 parameter buffers are pinned."""


def weight_bytes(config: ModelConfig, weights: Weights, *, quantised: bool) -> int:
    """Bytes of the HF checkpoint's tensors: 1 per parameter in block fp8 (ignoring the few bf16 ones), else 2."""
    return weights.model.total * (1 if quantised and config.quantisation else 2)


def checkpoint_bytes(recipe: Recipe, weights: Weights) -> int:
    """Bytes of one training checkpoint: weights, fp32 master weights and optimizer states."""
    return weights.trained.total * recipe.optimizer.kind.checkpoint_bytes(bf16=recipe.model.bf16)


def object_store_bytes(recipe: Recipe) -> int:
    """Shared memory for Ray on a node: two rollouts of token ids, log-probs and masks, at least 100 MB."""
    return max(100 * 10**6, 2 * recipe.rollout.samples * recipe.rollout.rollout_max_response_len * 32)


def pinned_bytes(size: float, exact_above: float = math.inf) -> int:
    """Bytes torch's pinned allocator takes for a buffer: the next power of two, or exact above a configurable size."""
    if size > exact_above:
        return math.ceil(size)
    return 1 << (math.ceil(size) - 1).bit_length() if size > 0 else 0


def exact_pinned_above(recipe: Recipe) -> float:
    """Bytes above which pinned buffers are not rounded up: `pinned_max_round_threshold_mb` of torch's allocator."""
    for name in ALLOCATOR_SETTINGS:
        if found := re.search(r"pinned_max_round_threshold_mb:(\d+)", recipe.misc.env.get(name, "")):
            return int(found[1]) * 2**20
    return math.inf


def node_memory(
    recipe: Recipe,
    config: ModelConfig,
    weights: Weights,
    ranks: Sequence[TrainerRank],
    engines: Sequence[EngineGpus],
    node: int,
    teacher: Sequence[EngineGpus] = (),
    teacher_bytes: int = 0,
) -> Memory:
    """Host memory of one node with these trainer ranks, engines and engines of a teacher of `teacher_bytes`."""
    on_node = _held(weights, ranks, exact_pinned_above(recipe))
    share, slots = _part(engines, node)
    if recipe.resources.device == "gpu":
        items = [*_gpu_trainer(recipe, on_node), *_gpu_engines(recipe, slots)]
    else:
        items = [*_cpu_trainer(recipe, on_node), *_cpu_engines(recipe, weights, share, slots)]
    items += _teacher(recipe, *_part(teacher, node), teacher_bytes)
    profiled = sum(rank.rank in recipe.profile.profile_ranks for rank in ranks)
    if profiled and recipe.profile.profiler == "torch":
        items.append(_profiler(recipe, config, weights.layout, profiled))
    if node == 0 and ranks and (recipe.checkpoint.save_hf or recipe.eval.eval_job):
        largest = max(one.elements for one in stage_tensors(config, ParallelLayout(), mtp=True)[0])
        why = f"a process that writes HF folders, with copies of one tensor of {_billions(largest)} parameters"
        items.append(_item("hf_export", EXPORT_PROCESS + EXPORT_COPIES * largest, why))
    store = object_store_bytes(recipe)
    items.append(_item("ray", RAY_NODE + store, f"raylet and agents, and an object store of {store / GB:.1f} GB"))
    if programs := programs_at_once(recipe.agent, None):
        each = recipe.agent.tool_memory
        why = f"{programs} programs of the tool python at once (--tool-programs), {each / 1e6:.0f} MB each"
        items.append(_item("programs", programs * each, f"{why} (--tool-memory)"))
    if node == 0 and (routes := routes_bytes(recipe, config)):
        why = "routes of a rollout's tokens in the driver until they are written (--use-rollout-routing-replay)"
        items.append(_item("routes", routes, why))
    present = tuple(item for item in items if item.bytes)
    return Memory(items=present, total_bytes=sum(item.bytes for item in present))


def routes_bytes(recipe: Recipe, config: ModelConfig) -> int:
    """Bytes of a rollout's routes if every response is as long as it may be; 0 where none are replayed."""
    if not recipe.algorithm.use_rollout_routing_replay or config.moe is None:
        return 0
    rollout = recipe.rollout
    tokens = rollout.samples * (rollout.rollout_max_response_len + (rollout.rollout_max_prompt_len or 1024))
    return tokens * config.num_layers * config.moe.top_k * (1 if config.moe.num_experts <= 256 else 2)


def _held(weights: Weights, ranks: Sequence[TrainerRank], exact_above: float) -> _Held:
    # Ranks of a stage hold the same.
    of_stage, layout = Counter(rank.pp for rank in ranks), weights.layout
    held = sum(number * weights.stages[pp].of_rank(layout) for pp, number in of_stage.items())
    kept = sum(number * weights.stages[pp].of_optimizer_rank(layout) for pp, number in of_stage.items())
    tensors = [(one, one.number * number) for pp, number in of_stage.items() for one in weights.tensors[pp]]
    shards = [(4 * one.elements / one.replicas, number) for one, number in tensors]
    whole = [(2 * one.elements, number) for one, number in tensors]
    # Megatron keeps a rank's dense parameters in one buffer and its experts' in another.
    buffers = [
        (2 * size, number) for pp, number in of_stage.items() for size in weights.stages[pp].buffers_of_rank(layout)
    ]

    def lost(sizes: Sequence[tuple[float, int]]) -> int:
        return math.ceil(sum(number * (pinned_bytes(size, exact_above) - size) for size, number in sizes))

    return _Held(len(ranks), held, kept, lost(shards), lost(whole), lost(buffers))


def _item(name: str, size: float, why: str) -> Item:
    return Item(name=name, bytes=math.ceil(size), why=why)


def _states(kind: OptimizerKind) -> str:
    return f"{len(kind.states)} state{'s' * (len(kind.states) != 1)}"


def _profiler(recipe: Recipe, config: ModelConfig, layout: ParallelLayout, ranks: int) -> Item:
    """Events of the profiler, for answers of full length: those of a rollout stay in memory until it ends."""
    tokens = recipe.rollout.samples * recipe.rollout.rollout_max_response_len
    a_batch = (recipe.perf.max_tokens_per_gpu or recipe.rollout.rollout_max_response_len) * layout.cp * layout.dp
    passes = 2 + recipe.needs_reference
    batches = math.ceil(tokens / a_batch) * passes
    events = batches * math.ceil(config.num_layers / layout.pp) * PROFILE_EVENTS
    what = f"{PROFILE_EVENTS} events for each layer of {batches} micro-batches"
    why = f"torch's profiler on {ranks} ranks: {what}, {PROFILE_EVENT_BYTES} bytes each"
    return _item("profiler", ranks * (PROFILE_PROCESS + events * PROFILE_EVENT_BYTES), why)


def _billions(elements: int) -> str:
    return f"{elements / 1e9:.1f} B" if elements >= 10**8 else f"{elements / 1e6:.1f} M"


def _gpu_trainer(recipe: Recipe, on_node: _Held) -> Iterator[Item]:
    size, kind = 2 if recipe.model.bf16 else 4, recipe.optimizer.kind
    held, kept, rounding, pinned = _billions(on_node.held), _billions(on_node.kept), 0, []
    if recipe.optimizer.optimizer_cpu_offload:
        host = kind.host_bytes()
        why = f"CPU Adam: {host} bytes (fp32 weight, gradient, {_states(kind)}) for each of {kept} parameters"
        yield _item("cpu_adam", host * on_node.kept, why)
        # Its fp32 weights are not pinned: Megatron converts the pinned bf16 copies.
        rounding += on_node.rounding_4
        pinned.append("CPU Adam's gradients")
    if recipe.resources.colocate:
        while_away = "parameters, while the engine holds the GPU"
        yield _item("weights_backup", size * on_node.held, f"{size} bytes for each of {held} {while_away}")
        why = "the same in pinned buffers of powers of two, one of dense and one of expert parameters a rank"
        yield _item("backup_rounding", on_node.rounding_buffers * size // 2, why)
        if not recipe.optimizer.optimizer_cpu_offload:
            states = kind.state_bytes(bf16=recipe.model.bf16)
            yield _item("optimizer_backup", states * on_node.kept, f"{states} bytes for each of {kept} {while_away}")
    if recipe.needs_reference:
        why = f"{size} bytes for each of {held} parameters, exchanged with the actor's for log-probs"
        yield _item("reference_copy", size * on_node.held, why)
        rounding += on_node.rounding_2 * size // 2
        pinned.append("the reference copy")
    if rounding:
        yield _item("pinned_rounding", rounding, f"pinned buffers take powers of two: {' and '.join(pinned)}")
    if recipe.checkpoint.async_save:
        size = kind.checkpoint_bytes(bf16=recipe.model.bf16)
        yield _item("save_buffers", size * on_node.kept, "the checkpoint of this node while it is written")
    why = f"{on_node.ranks} processes of {GPU_PROCESS / GB:.0f} GB (CUDA context, NCCL, libraries)"
    yield _item("trainer_processes", on_node.ranks * GPU_PROCESS, why)


def _part(engines: Sequence[EngineGpus], node: int) -> tuple[float, int]:
    """The engines' weights on the node as a multiple of one engine's, and their GPUs there."""
    here = [(len(engine.gpus[engine.nodes.index(node)]), sum(map(len, engine.gpus))) for engine in engines]
    return sum(mine / whole for mine, whole in here), sum(mine for mine, _ in here)


def _teacher(recipe: Recipe, share: float, slots: int, weights: int) -> Iterator[Item]:
    """The teacher's engines on a node; nothing where there are none."""
    if not slots:
        return
    if recipe.resources.device == "gpu":
        why = f"{slots} processes of {GPU_ENGINE_PROCESS / GB:.0f} GB (CUDA context, NCCL, libraries)"
        yield _item("teacher_processes", slots * GPU_ENGINE_PROCESS, why)
        return
    cache = float(recipe.misc.env.get("VLLM_CPU_KVCACHE_SPACE", "4")) * 2**30
    yield _item("teacher_weights", weights * share, "loaded by the teacher's engines of this node")
    yield _item("teacher_cache", slots * cache, f"{cache / 2**30:.0f} GiB an engine process (VLLM_CPU_KVCACHE_SPACE)")
    yield _item(
        "teacher_processes", slots * CPU_ENGINE_PROCESS, f"{slots} processes of {CPU_ENGINE_PROCESS / GB:.1f} GB"
    )


def _gpu_engines(recipe: Recipe, slots: int) -> Iterator[Item]:
    if recipe.resources.colocate:
        why = f"buffers and CUDA graphs of {slots} sleeping processes; their weights are dropped, the sync brings them"
        yield _item("engine_sleep_copy", slots * GPU_ENGINE_ASLEEP, why)
    why = f"{slots} processes of {GPU_ENGINE_PROCESS / GB:.0f} GB (CUDA context, NCCL, libraries)"
    yield _item("engine_processes", slots * GPU_ENGINE_PROCESS, why)


def _cpu_trainer(recipe: Recipe, on_node: _Held) -> Iterator[Item]:
    size, kind = 2 if recipe.model.bf16 else 4, recipe.optimizer.kind
    held, kept = _billions(on_node.held), _billions(on_node.kept)
    yield _item("weights", size * on_node.held, f"{size} bytes for each of {held} parameters")
    yield _item("gradients", 4 * on_node.held, f"4 bytes (fp32) for each of {held} parameters")
    states = kind.state_bytes(bf16=recipe.model.bf16)
    what = f"fp32 weight, {_states(kind)}" if recipe.model.bf16 else _states(kind)
    yield _item(kind.name, states * on_node.kept, f"{states} bytes ({what}) for each of {kept} parameters")
    if recipe.needs_reference:
        why = f"{size} bytes for each of {held} parameters, exchanged with the actor's for log-probs"
        yield _item("reference_copy", size * on_node.held, why)
    if recipe.checkpoint.async_save:
        saved = kind.checkpoint_bytes(bf16=recipe.model.bf16)
        yield _item("save_buffers", saved * on_node.kept, "the checkpoint of this node while it is written")
    why = f"{on_node.ranks} processes of {CPU_TRAINER_PROCESS / GB:.1f} GB (torch, Megatron)"
    yield _item("trainer_processes", on_node.ranks * CPU_TRAINER_PROCESS, why)


def _cpu_engines(recipe: Recipe, weights: Weights, share: float, slots: int) -> Iterator[Item]:
    yield _item("engine_weights", 2 * weights.model.total * share, "bf16, loaded by the engines of this node")
    cache = float(recipe.misc.env.get("VLLM_CPU_KVCACHE_SPACE", "4")) * 2**30
    yield _item("engine_cache", slots * cache, f"{cache / 2**30:.0f} GiB an engine process (VLLM_CPU_KVCACHE_SPACE)")
    why = f"{slots} processes of {CPU_ENGINE_PROCESS / GB:.1f} GB"
    yield _item("engine_processes", slots * CPU_ENGINE_PROCESS, why)
