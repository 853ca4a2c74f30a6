"""Host memory of a node, item by item: what the trainer, the engines and Ray keep there, and why.

Sizes follow from parameter counts and the recipe; what a process takes besides stands below as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vime.models.config import ModelConfig
from vime.planning.counts import Counts, model_counts, stage_counts
from vime.planning.types import EnginePlan, Item, Memory, TrainerRank
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe

GB = 10**9
PINNED_ROUNDING = 0.072
"""Pinned buffers are rounded up to powers of two; this share of CPU Adam's bytes for the tensors of a large model."""
GPU_PROCESS, GPU_ENGINE_PROCESS = 5 * GB, 5 * GB
"""Host memory of a process with a CUDA context, NCCL and its libraries."""
CPU_TRAINER_PROCESS, CPU_ENGINE_PROCESS = 900 * 10**6, 1_500 * 10**6
RAY_NODE = 400 * 10**6
"""Raylet, agents and idle workers of a node."""


@dataclass(frozen=True)
class Weights:
    """Parameter counts of the trainer's stages and of the whole model."""

    layout: ParallelLayout
    stages: tuple[Counts, ...]
    trained: tuple[Counts, ...]
    """Without frozen MTP layers."""
    model: Counts

    @classmethod
    def of(cls, recipe: Recipe, config: ModelConfig, layout: ParallelLayout) -> Weights:
        trained = stage_counts(config, layout, mtp=recipe.model.mtp_num_layers > 0)
        return cls(layout, stage_counts(config, layout), trained, model_counts(config))


def weight_bytes(config: ModelConfig, weights: Weights, *, quantised: bool) -> int:
    """Bytes of the HF checkpoint's tensors: 1 a parameter in block fp8 (the few others in 2 do not matter), else 2."""
    return weights.model.total * (1 if quantised and config.quantisation else 2)


def checkpoint_bytes(recipe: Recipe, weights: Weights) -> int:
    """Bytes of one training checkpoint: weights, fp32 master weights and both moments."""
    return weights.model.total * (14 if recipe.model.bf16 else 12)


def object_store_bytes(recipe: Recipe) -> int:
    """Shared memory Ray is given on a node: two rollouts of token ids, log-probs and masks, at least 100 MB."""
    samples = recipe.rollout.rollout_batch_size * recipe.rollout.n_samples_per_prompt
    return max(100 * 10**6, 2 * samples * recipe.rollout.rollout_max_response_len * 32)


def node_memory(
    recipe: Recipe,
    config: ModelConfig,
    weights: Weights,
    ranks: list[TrainerRank],
    engines: list[EnginePlan],
    node: int,
) -> Memory:
    """The account of one node with these trainer ranks and these engines on it."""
    held = sum(weights.stages[rank.pp].of_rank(weights.layout) for rank in ranks)
    graded = sum(weights.trained[rank.pp].of_rank(weights.layout) for rank in ranks)
    kept = sum(weights.trained[rank.pp].of_optimizer_rank(weights.layout) for rank in ranks)
    share = sum(len(engine.gpus[engine.nodes.index(node)]) / sum(map(len, engine.gpus)) for engine in engines)
    slots = sum(len(engine.gpus[engine.nodes.index(node)]) for engine in engines)
    if recipe.cluster.device == "gpu":
        items = [
            *_gpu_trainer(recipe, held, graded, kept, len(ranks)),
            *_gpu_engines(recipe, config, weights, share, slots),
        ]
    else:
        items = [*_cpu_trainer(recipe, held, graded, kept, len(ranks)), *_cpu_engines(recipe, weights, share, slots)]
    store = object_store_bytes(recipe)
    items.append(_item("ray", RAY_NODE + store, f"raylet and agents, and an object store of {store / GB:.1f} GB"))
    present = tuple(item for item in items if item.bytes)
    return Memory(items=present, total_bytes=sum(item.bytes for item in present))


def needs_reference(recipe: Recipe) -> bool:
    """Whether a copy of the reference model is kept."""
    return recipe.algorithm.use_kl_loss or recipe.algorithm.kl_coef != 0


def _item(name: str, size: float, why: str) -> Item:
    return Item(name=name, bytes=math.ceil(size), why=why)


def _billions(elements: int) -> str:
    return f"{elements / 1e9:.1f} B" if elements >= 10**8 else f"{elements / 1e6:.1f} M"


def _gpu_trainer(recipe: Recipe, held: int, graded: int, kept: int, ranks: int) -> Iterator[Item]:
    size = 2 if recipe.model.bf16 else 4
    grad = 4 if recipe.misc.accumulate_allreduce_grads_in_fp32 else size
    if recipe.optimizer.optimizer_cpu_offload:
        why = f"16 bytes (fp32 weight, gradient, two moments) for each of {_billions(kept)} parameters"
        yield _item("cpu_adam", 16 * kept, why)
        yield _item("pinned_rounding", PINNED_ROUNDING * 16 * kept, "pinned buffers are rounded up to powers of two")
    if recipe.cluster.colocate:
        while_away = "parameters, while the engine holds the GPU"
        yield _item("weights_backup", size * held, f"{size} bytes for each of {_billions(held)} {while_away}")
        yield _item("gradients_backup", grad * graded, f"{grad} bytes for each of {_billions(graded)} {while_away}")
    if needs_reference(recipe):
        why = f"two copies of {size} bytes for each of {_billions(held)} parameters, swapped in for log-probs"
        yield _item("actor_and_reference_copies", 2 * size * held, why)
    if recipe.checkpoint.async_save:
        yield _item("save_buffers", 14 * kept, "the checkpoint of this node while it is written")
    yield _item("trainer_processes", ranks * GPU_PROCESS, f"{ranks} processes of {GPU_PROCESS / GB:.0f} GB")


def _gpu_engines(recipe: Recipe, config: ModelConfig, weights: Weights, share: float, slots: int) -> Iterator[Item]:
    if recipe.cluster.colocate:
        size = weight_bytes(config, weights, quantised=True) * share
        yield _item("engine_sleep_copy", size, "the engines' weights on this node, while the trainer holds the GPU")
    yield _item(
        "engine_processes", slots * GPU_ENGINE_PROCESS, f"{slots} processes of {GPU_ENGINE_PROCESS / GB:.0f} GB"
    )


def _cpu_trainer(recipe: Recipe, held: int, graded: int, kept: int, ranks: int) -> Iterator[Item]:
    size = 2 if recipe.model.bf16 else 4
    yield _item("weights", size * held, f"{size} bytes for each of {_billions(held)} parameters")
    yield _item("gradients", 4 * graded, f"4 bytes for each of {_billions(graded)} parameters")
    states = 12 if recipe.model.bf16 else 8
    what = "fp32 weight and two moments" if recipe.model.bf16 else "two moments"
    yield _item("adam", states * kept, f"{states} bytes ({what}) for each of {_billions(kept)} parameters")
    if needs_reference(recipe):
        yield _item("reference_copy", size * held, f"{size} bytes for each of {_billions(held)} parameters")
    if recipe.checkpoint.async_save:
        yield _item("save_buffers", (size + states) * kept, "the checkpoint of this node while it is written")
    why = f"{ranks} processes of {CPU_TRAINER_PROCESS / GB:.1f} GB"
    yield _item("trainer_processes", ranks * CPU_TRAINER_PROCESS, why)


def _cpu_engines(recipe: Recipe, weights: Weights, share: float, slots: int) -> Iterator[Item]:
    yield _item("engine_weights", 2 * weights.model.total * share, "bf16, loaded by the engines of this node")
    cache = float(recipe.misc.env.get("VLLM_CPU_KVCACHE_SPACE", "4")) * 2**30
    yield _item("engine_cache", slots * cache, f"{cache / 2**30:.0f} GiB an engine process (VLLM_CPU_KVCACHE_SPACE)")
    why = f"{slots} processes of {CPU_ENGINE_PROCESS / GB:.1f} GB"
    yield _item("engine_processes", slots * CPU_ENGINE_PROCESS, why)
