"""The model described by an HF `config.json`, as one frozen type without torch, and the registry of families.

Each family reads its `config.json`: the module of `vime.models` that lists the architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from vime.errors import BadInput
from vime.models.namemap import Param


class NotTrained(BadInput):
    """A model of an architecture, or with an option, that vime does not train."""


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `factor` and the fields after it apply to `yarn` and `llama3` only."""

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
    """Multi-head latent attention: sizes in elements per head, ranks of the low-rank projections."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class MoE:
    """Routed experts. `layers[i]` is True if decoder layer i is a mixture of experts."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    layers: tuple[bool, ...]
    shared_ffn_hidden_size: int | None = None
    """Width of all shared experts together; None without any."""
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
    """`ue8m0` if scales are powers of two."""
    modules_to_not_convert: tuple[str, ...] | None = None
    """Modules stored unquantised; None: the family's table decides."""


@dataclass(frozen=True)
class ModelConfig:
    """One model, with sizes before any parallel split."""

    architecture: str
    num_layers: int
    """Number of decoder layers, without MTP layers."""
    hidden_size: int
    ffn_hidden_size: int
    """MLP width of the dense layers."""
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    """Query and key size per head in grouped attention; in MLA the rope-free part plus the rope part."""
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
        """Read the model of a `config.json`. Raises NotTrained for an architecture or option that vime does not train,
        BadInput for one that describes no model.
        """
        named = hf.get("architectures") or ["(none)"]
        architecture = str(named[0] if isinstance(named, list) else named)[:100]
        if architecture not in _FAMILIES:
            raise NotTrained(
                f"config.json names the architecture {architecture}, which vime does not know: "
                f"use one of {', '.join(sorted(_FAMILIES))} (docs/families.md)"
            )
        check_sizes(hf)
        try:
            return _FAMILIES[architecture].read(hf)
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise BadInput(
                f"config.json describes no {architecture} ({type(error).__name__}: {error}): fetch the checkpoint again"
            ) from error

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read the model of `<path>/config.json`."""
        return cls.from_hf(read_config(path))

    def is_moe_layer(self, layer: int) -> bool:
        """True if a decoder layer has routed experts; MTP layers, numbered after the last decoder layer, count too."""
        if self.moe is None:
            return False
        return self.moe.layers[layer] if layer < self.num_layers else True

    def padded_vocab_size(self, tp: int) -> int:
        """Rows of embedding and output: the vocabulary rounded up to a multiple of the tensor-parallel size.

        The usual sizes divide real vocabularies, so there is nothing to pad and no column to mask in the logits.
        """
        return -(-self.vocab_size // tp) * tp


def read_config(path: str | Path) -> dict[str, Any]:
    """`<path>/config.json`, of any model. Raises BadInput."""
    file = Path(path) / "config.json"
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"cannot read {file} ({error.strerror}): give the folder of an HF checkpoint") from error
    try:
        hf = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadInput(f"{file} is not JSON (line {error.lineno}: {error.msg}): fetch the checkpoint again") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is not JSON ({type(error).__name__}): fetch the checkpoint again") from error
    if not isinstance(hf, dict):
        raise BadInput(f"{file} holds no JSON object: fetch the checkpoint again")
    return hf


class Family(Protocol):
    """Interface of every family module. Pure functions, without torch."""

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]:
        """Names in `config.json`'s `architectures` that the family reads."""
        ...

    def read(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the model of a `config.json`. Raises BadInput for models that vime does not train."""
        ...

    def params(self, config: ModelConfig) -> tuple[Param, ...]:
        """Every parameter and persistent buffer, ordered as embedding, head, decoder layers, MTP layers.

        Decoder layers of which `is_moe_layer` says the same have the same parameters.
        """
        ...

    def megatron_config(self, config: ModelConfig) -> dict[str, Any]:
        """Values of Megatron's TransformerConfig (MLATransformerConfig for latent attention)."""
        ...

    def gpt_arguments(self, config: ModelConfig) -> dict[str, Any]:
        """Keyword arguments of Megatron's GPTModel that depend on the model alone."""
        ...


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Register a family's architectures. Raises ValueError for one that another family has."""
    for architecture in family.ARCHITECTURES:
        if _FAMILIES.setdefault(architecture, family) is not family:
            raise ValueError(f"architecture {architecture} belongs to another family")


def family_of(config: ModelConfig) -> Family:
    """Family of a model."""
    return _FAMILIES[config.architecture]


_SIZES = {
    "num_hidden_layers": 10**4,
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "moe_intermediate_size": 10**7,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "n_routed_experts": 10**5,
    "num_experts": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
}
"""Upper limits, far above every real model, for `config.json` numbers that determine how much memory is allocated."""


def check_sizes(hf: Mapping[str, Any]) -> None:
    """Raise BadInput for a size that no model has; families read the rest."""
    for name, most in _SIZES.items():
        value = hf.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= most):
            raise BadInput(f"config.json: {name} is {str(value)[:50]!r}: it must be a whole number from 1 to {most}")
    quantisation = hf.get("quantization_config")
    block = quantisation.get("weight_block_size") if isinstance(quantisation, Mapping) else None
    if block is not None:
        whole = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        if not whole:
            raise BadInput(f"config.json: weight_block_size is {str(block)[:50]}: it must be two numbers above 0")
