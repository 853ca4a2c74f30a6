"""Type of the declarative HF <-> Megatron name map. Each family module makes one table of these, without torch.

The same table serves conversion, direct start, export, weight sync and the plan's parameter counts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Join(enum.StrEnum):
    """Rule that builds a Megatron parameter from its HF tensors."""

    SINGLE = "single"
    STACK = "stack"
    """Parts stacked on dim 0: gate over up (each tensor-parallel rank has its gate rows over its up rows)."""
    QKV = "qkv"
    """q, k, v interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, …]."""


class Where(enum.StrEnum):
    """Part of the model that a parameter belongs to; determines its pipeline stage."""

    EMBEDDING = "embedding"
    DECODER = "decoder"
    HEAD = "head"
    MTP = "mtp"


@dataclass(frozen=True)
class HFTensor:
    """One tensor of the HF checkpoint."""

    name: str
    shape: tuple[int, ...]
    quantised: bool = False
    """True if the family's block-fp8 checkpoints store it quantised; `modules_to_not_convert` takes precedence."""
    aliases: tuple[str, ...] = ()
    """Names of further copies in a checkpoint (DeepSeek's MTP layer holds its own embedding and output head).

    Readers use `name`; export and weight sync write the current values under every alias that the checkpoint has.
    """


@dataclass(frozen=True)
class Param:
    """One logical Megatron parameter or persistent buffer: whole, named as in a single process with global indices."""

    name: str
    """`decoder.layers.{global layer}.mlp.experts.local_experts.{global expert}.linear_fc1.weight`; norms have their
    unfused name."""
    shape: tuple[int, ...]
    parts: tuple[HFTensor, ...]
    join: Join = Join.SINGLE
    tp_dim: int | None = None
    """Dimension split by tensor parallelism (expert tensor parallelism for experts); None: replicated."""
    where: Where = Where.DECODER
    layer: int | None = None
    """Index of the decoder layer in the whole model, or of the MTP layer."""
    expert: int | None = None
    """Index of the routed expert in the whole model."""
    fp32: bool = False
    """True if kept in fp32 regardless of the training dtype (the router's expert bias)."""
    buffer: bool = False
    """True for a persistent buffer, not trained by the optimizer."""
    kv_groups: int | None = None
    """Number of key-value groups of a QKV join."""
