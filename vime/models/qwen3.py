"""Qwen3, dense and mixture of experts: grouped-query attention with a norm on every query and key head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vime.models import blocks
from vime.models.config import ModelConfig
from vime.models.namemap import Param, Where


def params(config: ModelConfig) -> tuple[Param, ...]:
    """Every parameter; the published fp8 checkpoints quantise attention projections and MLP matrices."""
    return tuple(_params(config))


def _params(config: ModelConfig) -> Iterator[Param]:
    yield from blocks.ends(config)
    for layer in range(config.num_layers):
        name, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
        of: dict[str, Any] = {"where": Where.DECODER, "layer": layer}
        yield from blocks.norms(config, name, hf, **of)
        yield from blocks.grouped_attention(config, f"{name}.self_attention", f"{hf}.self_attn", **of)
        if config.moe is not None and config.is_moe_layer(layer):
            shape = (config.moe.num_experts, config.hidden_size)
            yield blocks.single(f"{name}.mlp.router.weight", f"{hf}.mlp.gate.weight", shape, **of)
            yield from blocks.experts(config, f"{name}.mlp", f"{hf}.mlp", **of)
        else:
            yield from blocks.gated_mlp(f"{name}.mlp", f"{hf}.mlp", config.hidden_size, config.ffn_hidden_size, **of)


def megatron_config(config: ModelConfig) -> dict[str, Any]:
    """Values of TransformerConfig."""
    return {
        **blocks.common_megatron_config(config),
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
    }


gpt_arguments = blocks.gpt_arguments
