"""The model as its HF `config.json` describes it, in one frozen type without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vime.errors import BadInput

FAMILIES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
}
"""Architecture in `config.json` -> module of `vime.models` that knows it."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `factor` and what follows it matter to `yarn` and `llama3` only."""

    theta: float
    kind: Literal["default", "yarn", "llama3"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention; sizes in elements a head, ranks of the low-rank projections."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class MoE:
    """Routed experts. `layers[i]` says whether decoder layer i is a mixture of experts."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    layers: tuple[bool, ...]
    shared_ffn_hidden_size: int | None = None
    """All shared experts together; None without any."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True
    expert_bias: bool = False
    num_groups: int | None = None
    topk_group: int | None = None
    scaling_factor: float | None = None


@dataclass(frozen=True)
class Quantisation:
    """Block fp8 storage of a checkpoint, from `quantization_config`."""

    block: tuple[int, int] = (128, 128)
    scale_format: str = "float32"
    """`ue8m0` where scales are powers of two."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """None: the family's table decides."""


@dataclass(frozen=True)
class ModelConfig:
    """One model. Sizes are of the whole model, before any parallel split."""

    architecture: str
    family: str
    num_layers: int
    """Decoder layers, without MTP layers."""
    hidden_size: int
    ffn_hidden_size: int
    """Of the dense layers."""
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    """Of queries and keys in grouped attention; in MLA the rope-free part plus the rope part."""
    vocab_size: int
    tie_word_embeddings: bool
    norm_eps: float
    max_position_embeddings: int
    rope: Rope
    initializer_range: float = 0.02
    qk_layernorm: bool = False
    mla: MLA | None = None
    moe: MoE | None = None
    mtp_layers: int = 0
    quantisation: Quantisation | None = None
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """`config.json` as read."""

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """The model of a `config.json`. Raises BadInput for an architecture or an option that vime does not train."""
        architecture = (hf.get("architectures") or ["(none)"])[0]
        if architecture not in FAMILIES:
            raise BadInput(
                f"config.json names the architecture {architecture}, which vime does not know: "
                f"use one of {', '.join(sorted(FAMILIES))} (docs/families.md)"
            )
        _refuse(hf)
        mla = _mla(hf) if FAMILIES[architecture] == "deepseek_v3" else None
        layers, heads, hidden = (
            _need(hf, "num_hidden_layers"),
            _need(hf, "num_attention_heads"),
            _need(hf, "hidden_size"),
        )
        head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else hf.get("head_dim") or hidden // heads
        config = cls(
            architecture=architecture,
            family=FAMILIES[architecture],
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=_need(hf, "intermediate_size"),
            num_attention_heads=heads,
            num_kv_heads=heads if mla else hf.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab_size=_need(hf, "vocab_size"),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=hf.get("max_position_embeddings", 4096),
            rope=_rope(hf, mla is not None),
            initializer_range=float(hf.get("initializer_range", 0.02)),
            qk_layernorm=FAMILIES[architecture] != "llama",
            mla=mla,
            moe=_moe(hf, architecture, layers),
            mtp_layers=int(hf.get("num_nextn_predict_layers") or 0) if mla else 0,
            quantisation=_quantisation(hf),
            hf=dict(hf),
        )
        if config.num_attention_heads % config.num_kv_heads:
            raise BadInput(
                f"config.json: num_attention_heads {config.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {config.num_kv_heads}"
            )
        return config

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """The model of `<path>/config.json`."""
        file = Path(path) / "config.json"
        try:
            text = file.read_text()
        except OSError as error:
            raise BadInput(f"cannot read {file} ({error.strerror}): give the folder of an HF checkpoint") from error
        try:
            hf = json.loads(text)
        except json.JSONDecodeError as error:
            raise BadInput(
                f"{file} is not JSON (line {error.lineno}: {error.msg}): fetch the checkpoint again"
            ) from error
        if not isinstance(hf, dict):
            raise BadInput(f"{file} holds no JSON object: fetch the checkpoint again")
        return cls.from_hf(hf)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a decoder layer (counted over MTP layers too, which follow the last one) has routed experts."""
        if self.moe is None:
            return False
        return self.moe.layers[layer] if layer < self.num_layers else True

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of embedding and output: the vocabulary rounded up to a multiple of the tensor-parallel size.

        Real vocabularies divide by the usual sizes, so there is nothing to pad and no column to mask in the logits.
        """
        return -(-self.vocab_size // tp) * tp


def _need(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise BadInput(f"config.json has no {key}: use the complete config.json of the checkpoint")
    return hf[key]


def _refuse(hf: Mapping[str, Any]) -> None:
    """Options that would silently change the model's function if they were left out."""
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(key):
            raise BadInput(f"config.json sets {key}, which vime does not train: use a checkpoint without it")
    if hf.get("hidden_act", "silu") != "silu":
        raise BadInput(f"config.json sets hidden_act {hf['hidden_act']!r}: vime trains silu models only")


def _mla(hf: Mapping[str, Any]) -> MLA:
    if not hf.get("rope_interleave", True):
        raise BadInput("config.json sets rope_interleave to false, which vime does not train: use a checkpoint with it")
    return MLA(
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=_need(hf, "kv_lora_rank"),
        qk_nope_head_dim=_need(hf, "qk_nope_head_dim"),
        qk_rope_head_dim=_need(hf, "qk_rope_head_dim"),
        v_head_dim=_need(hf, "v_head_dim"),
    )


def _moe(hf: Mapping[str, Any], architecture: str, layers: int) -> MoE | None:
    if architecture == "DeepseekV3ForCausalLM":
        if hf.get("scoring_func", "sigmoid") != "sigmoid" or hf.get("topk_method", "noaux_tc") != "noaux_tc":
            raise BadInput(
                f"config.json routes with {hf.get('scoring_func')}/{hf.get('topk_method')}: "
                "vime trains DeepSeek models with sigmoid/noaux_tc"
            )
        if not hf.get("norm_topk_prob", True):
            raise BadInput("config.json sets norm_topk_prob to false, which Megatron's sigmoid router does not have")
        dense, every = hf.get("first_k_dense_replace", 0), hf.get("moe_layer_freq", 1)
        ffn, shared = _need(hf, "moe_intermediate_size"), hf.get("n_shared_experts") or 0
        return MoE(
            num_experts=_need(hf, "n_routed_experts"),
            top_k=_need(hf, "num_experts_per_tok"),
            ffn_hidden_size=ffn,
            layers=tuple(i >= dense and i % every == 0 for i in range(layers)),
            shared_ffn_hidden_size=shared * ffn or None,
            score_function="sigmoid",
            expert_bias=True,
            num_groups=hf.get("n_group"),
            topk_group=hf.get("topk_group"),
            scaling_factor=float(hf.get("routed_scaling_factor", 1.0)),
        )
    if architecture == "Qwen3MoeForCausalLM":
        step, only = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or ())
        return MoE(
            # transformers 5 writes num_local_experts, the published checkpoints num_experts.
            num_experts=hf.get("num_experts") or _need(hf, "num_local_experts"),
            top_k=_need(hf, "num_experts_per_tok"),
            ffn_hidden_size=_need(hf, "moe_intermediate_size"),
            layers=tuple(i not in only and (i + 1) % step == 0 for i in range(layers)),
            norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
        )
    return None


def _rope(hf: Mapping[str, Any], mla: bool) -> Rope:
    """Reads both spellings: `rope_theta` beside `rope_scaling`, and one `rope_parameters`."""
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = float(given.get("rope_theta", hf.get("rope_theta", 10000.0)))
    allowed = ("default", "yarn") if mla else ("default", "llama3")
    if kind not in allowed:
        raise BadInput(
            f"config.json scales rope by {kind!r}, which vime does not train: use one of {', '.join(allowed)}"
        )
    if kind == "default":
        return Rope(theta)
    if "factor" not in given:
        raise BadInput(f"config.json scales rope by {kind!r} without a factor: use the complete config.json")
    original = given.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 4096)
    values: dict[str, Any] = {"factor": float(given["factor"]), "original_max_position_embeddings": int(original)}
    names = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim") if mla else ("low_freq_factor", "high_freq_factor")
    values |= {name: float(given[name]) for name in names if given.get(name) is not None}
    rope = Rope(theta, kind, **values)
    if kind == "llama3" and (rope.low_freq_factor, rope.high_freq_factor, original) != (1.0, 4.0, 8192):
        raise BadInput(
            "config.json scales rope by llama3 with other constants than 1, 4 and 8192, which Megatron has fixed"
        )
    if kind == "yarn" and (given.get("mscale") is None) != (given.get("mscale_all_dim") is None):
        raise BadInput("config.json gives only one of mscale and mscale_all_dim for yarn: give both or neither")
    return rope


def _quantisation(hf: Mapping[str, Any]) -> Quantisation | None:
    given = hf.get("quantization_config")
    if not given:
        return None
    if given.get("quant_method") != "fp8" or not given.get("weight_block_size"):
        raise BadInput(
            f"config.json quantises with {given.get('quant_method')!r}, blocks {given.get('weight_block_size')}: "
            "vime reads block fp8 (quant_method fp8 with weight_block_size) and unquantised checkpoints"
        )
    rows, columns = given["weight_block_size"]
    skipped = given.get("modules_to_not_convert")
    return Quantisation(
        block=(int(rows), int(columns)),
        scale_format=given.get("scale_fmt") or "float32",
        modules_to_not_convert=tuple(skipped) if skipped is not None else None,
    )
