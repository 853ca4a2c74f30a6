"""Parts of `config.json` that families read alike. Functions raise BadInput for models that vime does not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig, NotTrained, Quantisation, Rope


def need(hf: Mapping[str, Any], key: str) -> Any:
    """Value of a required key."""
    if hf.get(key) is None:
        raise BadInput(f"config.json has no {key}: use the complete config.json of the checkpoint")
    return hf[key]


def common(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig common to decoders of this kind; the family adds its own and may replace some."""
    _refuse(hf)
    heads, hidden = need(hf, "num_attention_heads"), need(hf, "hidden_size")
    groups = hf.get("num_key_value_heads") or heads
    if heads % groups:
        raise BadInput(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    return {
        "architecture": hf["architectures"][0],
        "num_layers": need(hf, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": need(hf, "intermediate_size"),
        "num_attention_heads": heads,
        "num_kv_heads": groups,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "vocab_size": need(hf, "vocab_size"),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "norm_eps": float(hf.get("rms_norm_eps", 1e-6)),
        "max_position_embeddings": hf.get("max_position_embeddings", 4096),
        "initializer_range": float(hf.get("initializer_range", 0.02)),
        "quantisation": quantisation(hf),
        "hf": dict(hf),
    }


def grouped(hf: Mapping[str, Any], **own: Any) -> ModelConfig:
    """A decoder with grouped-query attention; its rotary embedding is unscaled or scaled as in llama3."""
    return ModelConfig(**{**common(hf), "rope": rope(hf, ("default", "llama3")), **own})


def rope(hf: Mapping[str, Any], allowed: Sequence[str]) -> Rope:
    """Rotary embedding, scaled in one of the `allowed` ways.

    Reads both spellings: `rope_theta` with `rope_scaling`, and a single `rope_parameters`.
    """
    given = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = float(given.get("rope_theta", hf.get("rope_theta", 10000.0)))
    if kind not in allowed:
        raise NotTrained(
            f"config.json scales rope by {kind!r}, which vime does not train: use one of {', '.join(allowed)}"
        )
    if kind == "default":
        return Rope(theta)
    if "factor" not in given:
        raise BadInput(f"config.json scales rope by {kind!r} without a factor: use the complete config.json")
    original = given.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 4096)
    values: dict[str, Any] = {"factor": float(given["factor"]), "original_max_position_embeddings": int(original)}
    values |= {name: float(given[name]) for name in _ROPE_VALUES[kind] if given.get(name) is not None}
    found = Rope(theta, kind, **values)
    if kind == "llama3" and (found.low_freq_factor, found.high_freq_factor, original) != (1.0, 4.0, 8192):
        raise NotTrained(
            "config.json scales rope by llama3 with other constants than 1, 4 and 8192, which Megatron has fixed"
        )
    if kind == "yarn" and (given.get("mscale") is None) != (given.get("mscale_all_dim") is None):
        raise BadInput("config.json gives only one of mscale and mscale_all_dim for yarn: give both or neither")
    return found


_ROPE_VALUES = {
    "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


def _refuse(hf: Mapping[str, Any]) -> None:
    """Raise BadInput for options that would silently change the model's function if ignored."""
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if hf.get(key):
            raise NotTrained(f"config.json sets {key}, which vime does not train: use a checkpoint without it")
    if hf.get("hidden_act", "silu") != "silu":
        raise NotTrained(f"config.json sets hidden_act {hf['hidden_act']!r}: vime trains silu models only")


def quantisation(hf: Mapping[str, Any]) -> Quantisation | None:
    """Storage that `quantization_config` describes; None without one. Raises BadInput for another than block fp8."""
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
