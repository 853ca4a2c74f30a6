"""DeepSeek-V3 and R1, and models of their shape (Moonlight): latent attention, sigmoid router, MTP layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vime.errors import BadInput
from vime.models import blocks, reading
from vime.models.config import MLA, ModelConfig, MoE
from vime.models.namemap import Param, Where

ARCHITECTURES = ("DeepseekV3ForCausalLM",)


def read(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the model of a `config.json`."""
    common, mla = reading.common(hf), _mla(hf)
    own = {
        "num_kv_heads": common["num_attention_heads"],
        "head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        "rope": reading.rope(hf, ("default", "yarn")),
        "qk_layernorm": True,
        "mla": mla,
        "moe": _moe(hf),
        "mtp_layers": int(hf.get("num_nextn_predict_layers") or 0),
    }
    return ModelConfig(**{**common, **own})


def _mla(hf: Mapping[str, Any]) -> MLA:
    if not hf.get("rope_interleave", True):
        raise BadInput("config.json sets rope_interleave to false, which vime does not train: use a checkpoint with it")
    return MLA(
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=reading.need(hf, "kv_lora_rank"),
        qk_nope_head_dim=reading.need(hf, "qk_nope_head_dim"),
        qk_rope_head_dim=reading.need(hf, "qk_rope_head_dim"),
        v_head_dim=reading.need(hf, "v_head_dim"),
    )


def _moe(hf: Mapping[str, Any]) -> MoE:
    if hf.get("scoring_func", "sigmoid") != "sigmoid" or hf.get("topk_method", "noaux_tc") != "noaux_tc":
        raise BadInput(
            f"config.json routes with {hf.get('scoring_func')}/{hf.get('topk_method')}: "
            "vime trains DeepSeek models with sigmoid/noaux_tc"
        )
    if not hf.get("norm_topk_prob", True):
        raise BadInput("config.json sets norm_topk_prob to false, which Megatron's sigmoid router does not have")
    dense, every = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
    ffn, shared = reading.need(hf, "moe_intermediate_size"), hf.get("n_shared_experts") or 0
    return MoE(
        num_experts=reading.need(hf, "n_routed_experts"),
        top_k=reading.need(hf, "num_experts_per_tok"),
        ffn_hidden_size=ffn,
        layers=tuple(i >= dense and i % every == 0 for i in range(reading.need(hf, "num_hidden_layers"))),
        shared_ffn_hidden_size=shared * ffn or None,
        score_function="sigmoid",
        expert_bias=True,
        num_groups=hf.get("n_group"),
        topk_group=hf.get("topk_group"),
        scaling_factor=float(hf.get("routed_scaling_factor", 1.0)),
    )


def params(config: ModelConfig) -> tuple[Param, ...]:
    """Every parameter and persistent buffer, MTP layers included.

    The published fp8 checkpoint quantises attention projections and all MLP and expert matrices, but not the embedding,
    head, norms, router, router bias and `eh_proj`.
    """
    return tuple(_params(config))


def _params(config: ModelConfig) -> Iterator[Param]:
    mtp = [f"model.layers.{config.num_layers + number}" for number in range(config.mtp_layers)]
    # The checkpoint repeats the embedding and the head in each MTP layer; the model shares them.
    yield from blocks.ends(
        config,
        embedding_copies=tuple(f"{layer}.embed_tokens.weight" for layer in mtp),
        head_copies=tuple(f"{layer}.shared_head.head.weight" for layer in mtp),
    )
    for layer in range(config.num_layers):
        yield from _layer(config, f"decoder.layers.{layer}", layer, where=Where.DECODER, layer=layer)
    for number in range(config.mtp_layers):
        yield from _mtp(config, number)


def _mtp(config: ModelConfig, number: int) -> Iterator[Param]:
    """One MTP layer: norms of both inputs, their projection, a decoder layer, a norm before the shared head."""
    index, hidden = config.num_layers + number, config.hidden_size
    name, hf = f"mtp.layers.{number}", f"model.layers.{index}"
    of: dict[str, Any] = {"where": Where.MTP, "layer": number}
    yield blocks.single(f"{name}.enorm.weight", f"{hf}.enorm.weight", (hidden,), **of)
    yield blocks.single(f"{name}.hnorm.weight", f"{hf}.hnorm.weight", (hidden,), **of)
    yield blocks.single(f"{name}.eh_proj.weight", f"{hf}.eh_proj.weight", (hidden, 2 * hidden), tp_dim=0, **of)
    yield from _layer(config, f"{name}.transformer_layer", index, **of)
    yield blocks.single(f"{name}.final_layernorm.weight", f"{hf}.shared_head.norm.weight", (hidden,), **of)


def _layer(config: ModelConfig, name: str, index: int, **of: Any) -> Iterator[Param]:
    hf = f"model.layers.{index}"
    yield from blocks.norms(config, name, hf, **of)
    yield from _attention(config, f"{name}.self_attention", f"{hf}.self_attn", **of)
    if not config.is_moe_layer(index):
        yield from blocks.gated_mlp(f"{name}.mlp", f"{hf}.mlp", config.hidden_size, config.ffn_hidden_size, **of)
        return
    assert config.moe is not None
    experts, hidden = config.moe.num_experts, config.hidden_size
    yield blocks.single(f"{name}.mlp.router.weight", f"{hf}.mlp.gate.weight", (experts, hidden), **of)
    bias = f"{hf}.mlp.gate.e_score_correction_bias"
    yield blocks.single(f"{name}.mlp.router.expert_bias", bias, (experts,), fp32=True, buffer=True, **of)
    if config.moe.shared_ffn_hidden_size:
        shared = config.moe.shared_ffn_hidden_size
        yield from blocks.gated_mlp(f"{name}.mlp.shared_experts", f"{hf}.mlp.shared_experts", hidden, shared, **of)
    yield from blocks.experts(config, f"{name}.mlp", f"{hf}.mlp", **of)


def _attention(config: ModelConfig, name: str, hf: str, **of: Any) -> Iterator[Param]:
    """Latent attention: down-projections replicated over tensor parallelism, up-projections split by head."""
    mla = config.mla
    assert mla is not None
    hidden, heads, rope = config.hidden_size, config.num_attention_heads, mla.qk_rope_head_dim
    q_rows = heads * (mla.qk_nope_head_dim + rope)

    def matrix(ours: str, theirs: str, shape: tuple[int, int], tp_dim: int | None) -> Param:
        return blocks.single(
            f"{name}.{ours}.weight", f"{hf}.{theirs}.weight", shape, quantised=True, tp_dim=tp_dim, **of
        )

    if mla.q_lora_rank is None:
        yield matrix("linear_q_proj", "q_proj", (q_rows, hidden), 0)
    else:
        yield matrix("linear_q_down_proj", "q_a_proj", (mla.q_lora_rank, hidden), None)
        yield blocks.single(f"{name}.q_layernorm.weight", f"{hf}.q_a_layernorm.weight", (mla.q_lora_rank,), **of)
        yield matrix("linear_q_up_proj", "q_b_proj", (q_rows, mla.q_lora_rank), 0)
    yield matrix("linear_kv_down_proj", "kv_a_proj_with_mqa", (mla.kv_lora_rank + rope, hidden), None)
    yield blocks.single(f"{name}.kv_layernorm.weight", f"{hf}.kv_a_layernorm.weight", (mla.kv_lora_rank,), **of)
    up_rows = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield matrix("linear_kv_up_proj", "kv_b_proj", (up_rows, mla.kv_lora_rank), 0)
    yield matrix("linear_proj", "o_proj", (hidden, heads * mla.v_head_dim), 1)


def megatron_config(config: ModelConfig) -> dict[str, Any]:
    """Values of MLATransformerConfig."""
    mla, rope = config.mla, config.rope
    assert mla is not None
    values = {
        **blocks.common_megatron_config(config),
        "multi_latent_attention": True,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_head_dim": mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        # Not used by MLA itself, but Megatron computes defaults from it.
        "kv_channels": mla.v_head_dim,
        "rotary_base": rope.theta,
        "rope_type": "yarn" if rope.kind == "yarn" else "rope",
        "rotary_scaling_factor": rope.factor,
    }
    if rope.kind == "yarn":
        values |= {
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "mscale": rope.mscale,
            "mscale_all_dim": rope.mscale_all_dim,
        }
    return values


gpt_arguments = blocks.gpt_arguments
