"""Estimated GPU memory of a rank, for training and for the engine, to choose sizes before anything is queued.

Weights, gradients and optimizer states follow from exact parameter counts. Activations are the tensors that the
backward pass needs (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", with
this model's widths), with evenly loaded experts. Kernel workspaces and allocator gaps are the constants below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vime.models.config import ModelConfig
from vime.planning.counts import model_counts
from vime.planning.memory import GB, Weights
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.run.plan import GpuMemory, Item, Memory

DEFAULT_GPU_BYTES = 80 * GB
"""Memory assumed for GPUs that the cluster profile does not describe: an H100."""
TRAINER_PROCESS = 4 * GB
"""Memory of a trainer process without tensors. Measured on an H100: 0.8 GB of CUDA context and libraries, 0.6 GB of
NCCL and 0.4 GB per communicator of a group in use, of which a rank of the recipes has six to eight."""
TRAINER_RESERVE = TRAINER_PROCESS + 2 * GB
"""The process, workspaces and allocator gaps."""
ENGINE_RESERVE = 5 * GB
"""CUDA context and graphs, NCCL buffers and vLLM's activations."""
ENGINE_CONTEXT = 1 * GB
"""Memory of an engine process beyond its share, since vLLM measures from after its CUDA context."""
ENGINE_ASLEEP = 3 * GB
"""Memory that a sleeping engine process keeps: CUDA context, graphs, NCCL buffers, workspaces. Measured with a
tiny model on one H100: 1.3 GB."""
VLLM_SHARE = 0.92
"""vLLM's default for `--vllm-gpu-memory-utilization`."""
LOGITS_CHUNK = 1024
"""Tokens whose logits the loss of a trained MTP layer holds in fp32 at a time (vime.megatron.logprobs)."""


@dataclass(frozen=True)
class MicroBatchTokens:
    """Tokens of the largest micro-batch on one rank."""

    a_rank: int
    why: str


def stage_memory(recipe: Recipe, config: ModelConfig, weights: Weights, stage: int, gpu_bytes: int) -> GpuMemory:
    """Estimate for a rank of one pipeline stage and, on the same kind of GPU, a rank of an engine."""
    training = _memory(_training(recipe, config, weights, stage))
    budget = int(float(recipe.engine.vllm.get("gpu_memory_utilization", VLLM_SHARE)) * gpu_bytes)
    engine = list(_engine(recipe, config))
    left = budget - sum(item.bytes for item in engine)
    per_token = kv_bytes_per_token(recipe, config)
    tokens = max(0, left) // per_token
    of_what = f"{budget / GB:.0f} GB (--vllm-gpu-memory-utilization)"
    why = f"what is left of {of_what}: {tokens:,} tokens of {per_token:,} bytes"
    engine.append(Item(name="kv_cache", bytes=max(0, left), why=why))
    return GpuMemory(
        training=training, engine=_memory(engine), gpu_bytes=gpu_bytes, kv_cache_tokens=tokens, missing=max(0, -left)
    )


def training_bytes(recipe: Recipe, config: ModelConfig, weights: Weights, stage: int) -> int:
    """Estimate for training alone."""
    return sum(item.bytes for item in _training(recipe, config, weights, stage))


def _memory(items: Iterator[Item] | list[Item]) -> Memory:
    present = tuple(item for item in items if item.bytes)
    return Memory(items=present, total_bytes=sum(item.bytes for item in present))


def _item(name: str, size: float, why: str) -> Item:
    return Item(name=name, bytes=math.ceil(size), why=why)


def micro_batch_tokens(recipe: Recipe, layout: ParallelLayout) -> MicroBatchTokens:
    """Tokens of the largest micro-batch on a context-parallel rank; a sample over the limit forms its own batch."""
    rollout, perf = recipe.rollout, recipe.perf
    longest = rollout.rollout_max_response_len + (rollout.rollout_max_prompt_len or 1024)
    alone = -(-longest // layout.cp)
    if perf.use_dynamic_batch_size and perf.max_tokens_per_gpu:
        if perf.max_tokens_per_gpu >= alone:
            return MicroBatchTokens(
                perf.max_tokens_per_gpu, f"{perf.max_tokens_per_gpu:,} tokens (--max-tokens-per-gpu)"
            )
        return MicroBatchTokens(alone, f"{alone:,} tokens (a sample of {longest:,} over CP{layout.cp})")
    tokens = perf.micro_batch_size * alone
    return MicroBatchTokens(
        tokens, f"{tokens:,} tokens (--micro-batch-size {perf.micro_batch_size} of {longest:,} over CP{layout.cp})"
    )


def _training(recipe: Recipe, config: ModelConfig, weights: Weights, stage: int) -> Iterator[Item]:
    layout, counts = weights.layout, weights.stages[stage]
    held, kept = counts.of_rank(layout), counts.of_optimizer_rank(layout)
    size = 2 if recipe.model.bf16 else 4
    grad = 4 if recipe.misc.accumulate_allreduce_grads_in_fp32 else size
    yield _item("weights", size * held, f"{size} bytes for each of {held / 1e9:.2f} B parameters")
    yield _item("gradients", grad * held, f"{grad} bytes for each of them")
    if not recipe.optimizer.optimizer_cpu_offload:
        states = recipe.optimizer.kind.state_bytes(bf16=recipe.model.bf16)
        yield _item("optimizer", states * kept, f"{states} bytes for each of the {kept / 1e9:.2f} B of its share")
    tokens = micro_batch_tokens(recipe, layout)
    yield from _activations(recipe, config, layout, stage, tokens)
    if stage == layout.pp - 1:
        columns = config.padded_vocab_size(layout.tp) // layout.tp
        logits, text = 2 * size * tokens.a_rank * columns, f"logits and their gradient, {columns:,} columns"
        if recipe.model.mtp_num_layers:
            logits += 3 * 4 * min(tokens.a_rank, LOGITS_CHUNK) * columns
            text += ", and fp32 chunks of the drafts' loss"
        yield _item("logits", logits, text)
    yield _item("reserve", TRAINER_RESERVE, "CUDA context, NCCL, workspaces, gaps of the allocator")


def _activations(
    recipe: Recipe, config: ModelConfig, layout: ParallelLayout, stage: int, tokens: MicroBatchTokens
) -> Iterator[Item]:
    layers = layout.stage_layers(config.num_layers)[stage]
    in_flight = layout.pp - stage  # 1F1B: one micro-batch for each stage from this one to the last
    per_layer = [layer_bytes(config, layout, layer, tokens.a_rank) for layer in layers]
    stored = boundary_bytes(config, layout, tokens.a_rank)
    perf = recipe.perf
    if perf.recompute_granularity == "full":
        kept_whole = 0
        if perf.recompute_method == "block":
            # The first layers of the stage are recomputed, the others keep everything.
            kept_whole = sum(per_layer[perf.recompute_num_layers or 0 :])
            units = min(perf.recompute_num_layers or 0, len(layers))
        else:
            units = -(-len(layers) // (perf.recompute_num_layers or 1))
        size = in_flight * (units * stored + kept_whole)
        how = f"recomputed: the inputs of {units} of {len(layers)} layers"
        yield _item("activations", size, f"{how}, {in_flight} micro-batches of {tokens.why} in flight")
        at_once = (perf.recompute_num_layers or 1) if perf.recompute_method == "uniform" else 1
        yield _item("recomputed_layer", at_once * max(per_layer), "what one recomputed unit holds in its backward pass")
        return
    size = in_flight * sum(per_layer)
    yield _item("activations", size, f"{len(layers)} layers, {in_flight} micro-batches of {tokens.why} in flight")


def boundary_bytes(config: ModelConfig, layout: ParallelLayout, tokens: int) -> int:
    """Bytes of one layer's bf16 input; sequence parallelism divides it."""
    return 2 * tokens * config.hidden_size // (layout.tp if layout.sequence_parallel else 1)


def layer_bytes(config: ModelConfig, layout: ParallelLayout, layer: int, tokens: int) -> int:
    """Bytes the backward pass of one layer needs in bf16: inputs of norms, projections, attention and MLP."""
    hidden, tp = config.hidden_size, layout.tp
    along = 5 * hidden / (tp if layout.sequence_parallel else 1)
    heads = config.num_attention_heads
    if config.mla is not None:
        mla = config.mla
        down = (mla.q_lora_rank or 0) + mla.kv_lora_rank + mla.qk_rope_head_dim
        query_key = 2 * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        attention = 2 * down + (query_key + 2 * heads * mla.v_head_dim) / tp
    else:
        attention = (2 * heads + 2 * config.num_kv_heads) * config.head_dim / tp
    moe = config.moe
    if moe is None or not config.is_moe_layer(layer):
        return math.ceil(2 * tokens * (along + attention + 3 * config.ffn_hidden_size / tp))
    # Tokens are divided over the tensor-parallel ranks before dispatch to their experts.
    routed = moe.top_k * (2 * hidden + 3 * moe.ffn_hidden_size) / tp
    shared = 3 * (moe.shared_ffn_hidden_size or 0) / tp
    return math.ceil(2 * tokens * (along + attention + routed + shared))


def engine_sizes(recipe: Recipe) -> tuple[int, int]:
    """(tensor parallel, data parallel) sizes of an engine."""
    data_parallel = int(recipe.engine.vllm.get("data_parallel_size", 1))
    return max(1, recipe.engine.rollout_num_gpus_per_engine // data_parallel), data_parallel


def kv_bytes_per_token(recipe: Recipe, config: ModelConfig) -> int:
    """Bytes of a token's KV cache on one GPU: each layer's latent vector (MLA), or keys and values of its heads."""
    tensor_parallel, _ = engine_sizes(recipe)
    size = 1 if "fp8" in str(recipe.engine.vllm.get("kv_cache_dtype", "auto")) else 2
    if config.mla is not None:
        return size * (config.mla.kv_lora_rank + config.mla.qk_rope_head_dim) * config.num_layers
    heads = max(1, config.num_kv_heads // tensor_parallel)
    return size * 2 * heads * config.head_dim * config.num_layers


def engine_weights(recipe: Recipe, config: ModelConfig) -> int:
    """Bytes of an engine's weights on one GPU."""
    return next(_engine(recipe, config)).bytes


def _engine(recipe: Recipe, config: ModelConfig) -> Iterator[Item]:
    counts = model_counts(config)
    tensor_parallel, data_parallel = engine_sizes(recipe)
    over = tensor_parallel * data_parallel if recipe.engine.vllm.get("enable_expert_parallel") else tensor_parallel
    size = 1 if config.quantisation else 2
    here = counts.split / tensor_parallel + counts.copied + counts.experts / over
    ways = f"experts over {over} GPUs, the rest over {tensor_parallel}"
    yield _item(
        "weights", size * here, f"{size} byte{'s' * (size > 1)} for each of {here / 1e9:.2f} B parameters: {ways}"
    )
    yield _item("reserve", ENGINE_RESERVE, "CUDA context and graphs, NCCL, vLLM's activations")
