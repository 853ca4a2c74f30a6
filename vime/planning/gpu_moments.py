"""Memory of one GPU at each moment of a rollout when trainer and engine take turns on it (`--colocate`).

Both processes live for the whole run, so their contexts, libraries and communicators count at every moment; weights,
gradients and caches come and go in the order of `vime.train.handover`. The sums give the share of the memory that the
engine may take, and refuse a run that does not fit before it is queued.
"""

from __future__ import annotations

import math

from vime.models.config import ModelConfig
from vime.planning.gpu_memory import (
    ENGINE_ASLEEP,
    ENGINE_CONTEXT,
    ENGINE_RESERVE,
    TRAINER_PROCESS,
    VLLM_SHARE,
    engine_weights,
    layer_bytes,
    micro_batch_tokens,
    training_bytes,
)
from vime.planning.memory import GB, Weights
from vime.recipe.load import change
from vime.recipe.schema import Recipe
from vime.run.plan import Item

OPEN_BUCKETS = 2
"""Weight sync buckets in the trainer's memory at once (`vime.sync.parts.BUFFERS`), and as many in the engine's."""


def with_share(recipe: Recipe, config: ModelConfig, weights: Weights, gpu_bytes: int) -> Recipe:
    """Derive `--vllm-gpu-memory-utilization` for `--colocate` if not given: the memory left by the trainer while
    it holds its weights and engines generate, rounded to hundredths, at most vLLM's default."""
    shares = recipe.resources.colocate and recipe.resources.device == "gpu"
    if not shares or "gpu_memory_utilization" in recipe.engine.vllm:
        return recipe
    beside = ENGINE_CONTEXT + max(_comparing(recipe, config, weights, stage) for stage in range(weights.layout.pp))
    share = min(VLLM_SHARE, math.floor(100 * (1 - beside / gpu_bytes)) / 100)
    return change(recipe, engine={"vllm": {**recipe.engine.vllm, "gpu_memory_utilization": max(0.01, share)}})


def moments(recipe: Recipe, config: ModelConfig, weights: Weights, stage: int, gpu_bytes: int) -> tuple[Item, ...]:
    """Bytes of a GPU at each moment of a rollout, for ranks of one pipeline stage; empty without `--colocate`."""
    if not recipe.resources.colocate:
        return ()
    share = float(recipe.engine.vllm.get("gpu_memory_utilization", VLLM_SHARE))
    engine = math.ceil(share * gpu_bytes) + ENGINE_CONTEXT
    answers = f"an engine of {engine / GB:.1f} GB (--vllm-gpu-memory-utilization {share:g} and its context)"
    training = training_bytes(recipe, config, weights, stage)
    trainer = _weights(recipe, weights, stage)
    buffers = 2 * OPEN_BUCKETS * recipe.engine.update_weight_buffer_size
    comparing = _comparing(recipe, config, weights, stage)
    asleep = f"{ENGINE_ASLEEP / GB:.1f} GB of a sleeping engine's process"
    process = f"{TRAINER_PROCESS / GB:.1f} GB of the trainer's process"
    return (
        _moment("training", training + ENGINE_ASLEEP, f"the trainer's {training / GB:.1f} GB, {asleep}"),
        _moment(
            "weight sync",
            trainer + buffers + engine_weights(recipe, config) + ENGINE_RESERVE,
            f"the weights of trainer and engine, {buffers / GB:.1f} GB of buckets, both processes",
        ),
        _moment("comparing", comparing + engine, f"the trainer's {comparing / GB:.1f} GB for log-probs, {answers}"),
        _moment("generating", TRAINER_PROCESS + engine, f"{process}, {answers}"),
    )


def _comparing(recipe: Recipe, config: ModelConfig, weights: Weights, stage: int) -> int:
    """Bytes of the trainer while engines generate: its weights, and the forward pass of one micro-batch."""
    layout, tokens = weights.layout, micro_batch_tokens(recipe, weights.layout).a_rank
    widest = max(layer_bytes(config, layout, layer, tokens) for layer in layout.stage_layers(config.num_layers)[stage])
    logits = 0
    if stage == layout.pp - 1:
        columns = config.padded_vocab_size(layout.tp) // layout.tp
        logits = columns * (2 if recipe.model.bf16 else 4) * tokens
    return _weights(recipe, weights, stage) + max(widest, logits)


def _weights(recipe: Recipe, weights: Weights, stage: int) -> int:
    """Bytes of the trainer's process with its weights and nothing else."""
    return TRAINER_PROCESS + (2 if recipe.model.bf16 else 4) * math.ceil(weights.stages[stage].of_rank(weights.layout))


def _moment(name: str, size: float, why: str) -> Item:
    return Item(name=name, bytes=math.ceil(size), why=why)
