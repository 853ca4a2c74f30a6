"""Qwen3, dense and mixture of experts: grouped-query attention with a norm on every query and key head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vime.models import blocks, reading
from vime.models.config import ModelConfig, MoE
from vime.models.namemap import Param, Where

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")


def read(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the model of a `config.json`, dense or with experts."""
    return reading.grouped(hf, qk_layernorm=True, moe=_moe(hf) if "Moe" in hf["architectures"][0] else None)


def _moe(hf: Mapping[str, Any]) -> MoE:
    step, only = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
    return MoE(
        # transformers 5 writes num_local_experts, the published checkpoints num_experts.
        num_experts=hf.get("num_experts") or reading.need(hf, "num_local_experts"),
        top_k=reading.need(hf, "num_experts_per_tok"),
        ffn_hidden_size=reading.need(hf, "moe_intermediate_size"),
        layers=tuple(i not in only and (i + 1) % step == 0 for i in range(reading.need(hf, "num_hidden_layers"))),
        norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
    )


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
    """Values of Megatron's TransformerConfig."""
    return {
        **blocks.common_megatron_config(config),
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
    }


gpt_arguments = blocks.gpt_arguments
