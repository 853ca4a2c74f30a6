"""Name map pieces shared by families: embedding, head, gated MLP, experts, and Megatron config values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vime.models.config import ModelConfig
from vime.models.namemap import HFTensor, Join, Param, Where


def ends(
    config: ModelConfig, *, embedding_copies: tuple[str, ...] = (), head_copies: tuple[str, ...] = ()
) -> Iterator[Param]:
    """Embedding, final norm and output head; a tied model has no head, but its checkpoint may hold a copy."""
    shape = (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings:
        embedding_copies += ("lm_head.weight", *head_copies)
    yield Param(
        "embedding.word_embeddings.weight",
        shape,
        (HFTensor("model.embed_tokens.weight", shape, aliases=embedding_copies),),
        tp_dim=0,
        where=Where.EMBEDDING,
    )
    yield single("decoder.final_layernorm.weight", "model.norm.weight", (config.hidden_size,), where=Where.HEAD)
    if not config.tie_word_embeddings:
        yield Param(
            "output_layer.weight",
            shape,
            (HFTensor("lm_head.weight", shape, aliases=head_copies),),
            tp_dim=0,
            where=Where.HEAD,
        )


def single(name: str, hf: str, shape: tuple[int, ...], *, quantised: bool = False, **other: Any) -> Param:
    """A parameter identical to one HF tensor."""
    return Param(name, shape, (HFTensor(hf, shape, quantised),), **other)


def gated_mlp(name: str, hf: str, hidden: int, ffn: int, **other: Any) -> Iterator[Param]:
    """`linear_fc1` (gate over up, [2 ffn, hidden]) and `linear_fc2` ([hidden, ffn]) of one MLP or expert."""
    gate, up = (HFTensor(f"{hf}.{part}_proj.weight", (ffn, hidden), True) for part in ("gate", "up"))
    yield Param(f"{name}.linear_fc1.weight", (2 * ffn, hidden), (gate, up), Join.STACK, tp_dim=0, **other)
    down = HFTensor(f"{hf}.down_proj.weight", (hidden, ffn), True)
    yield Param(f"{name}.linear_fc2.weight", (hidden, ffn), (down,), tp_dim=1, **other)


def experts(config: ModelConfig, name: str, hf: str, **other: Any) -> Iterator[Param]:
    """Routed experts of one layer."""
    assert config.moe is not None
    for number in range(config.moe.num_experts):
        yield from gated_mlp(
            f"{name}.experts.local_experts.{number}",
            f"{hf}.experts.{number}",
            config.hidden_size,
            config.moe.ffn_hidden_size,
            expert=number,
            **other,
        )


def grouped_attention(config: ModelConfig, name: str, hf: str, **other: Any) -> Iterator[Param]:
    """Grouped-query attention: one QKV matrix interleaved by key-value group, output projection, head norms."""
    hidden, dim, groups = config.hidden_size, config.head_dim, config.num_kv_heads
    rows = {"q": config.num_attention_heads * dim, "k": groups * dim, "v": groups * dim}
    parts = tuple(HFTensor(f"{hf}.{part}_proj.weight", (size, hidden), True) for part, size in rows.items())
    shape = (sum(rows.values()), hidden)
    yield Param(f"{name}.linear_qkv.weight", shape, parts, Join.QKV, tp_dim=0, kv_groups=groups, **other)
    yield single(
        f"{name}.linear_proj.weight", f"{hf}.o_proj.weight", (hidden, rows["q"]), quantised=True, tp_dim=1, **other
    )
    if config.qk_layernorm:
        for part in ("q", "k"):
            yield single(f"{name}.{part}_layernorm.weight", f"{hf}.{part}_norm.weight", (dim,), **other)


def norms(config: ModelConfig, name: str, hf: str, **other: Any) -> Iterator[Param]:
    """Input norm and pre-MLP norm of a layer."""
    for ours, theirs in (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm")):
        yield single(f"{name}.{ours}.weight", f"{hf}.{theirs}.weight", (config.hidden_size,), **other)


def common_megatron_config(config: ModelConfig) -> dict[str, Any]:
    """TransformerConfig values common to all families."""
    return {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_eps,
        "qk_layernorm": config.qk_layernorm,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "gated_linear_unit": True,
        "init_method_std": config.initializer_range,
        "apply_rope_fusion": False,
        **moe_megatron_config(config),
    }


def moe_megatron_config(config: ModelConfig) -> dict[str, Any]:
    """Mixture-of-experts values of TransformerConfig; empty for a dense model."""
    moe = config.moe
    if moe is None:
        return {}
    values: dict[str, Any] = {
        "num_moe_experts": moe.num_experts,
        "moe_layer_freq": [int(layer) for layer in moe.layers],
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.score_function,
        # Megatron's softmax after top-k equals a softmax over all experts, normalised over the chosen ones.
        "moe_router_pre_softmax": moe.score_function == "sigmoid" or not moe.norm_topk_prob,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.expert_bias else "aux_loss",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
    }
    if moe.shared_ffn_hidden_size:
        values["moe_shared_expert_intermediate_size"] = moe.shared_ffn_hidden_size
    if moe.num_groups and moe.topk_group:
        values |= {"moe_router_num_groups": moe.num_groups, "moe_router_group_topk": moe.topk_group}
    if moe.scaling_factor is not None:
        values["moe_router_topk_scaling_factor"] = moe.scaling_factor
    return values


def gpt_arguments(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's GPTModel that follow from the model (`vocab_size` depends on the layout too)."""
    return {
        "max_sequence_length": config.max_position_embeddings,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "position_embedding_type": "rope",
        "rotary_percent": 1.0,
        "rotary_base": int(config.rope.theta) if config.rope.theta.is_integer() else config.rope.theta,
        "rope_scaling": config.rope.kind == "llama3",
        "rope_scaling_factor": config.rope.factor,
    }
