"""The type of the declarative HF <-> Megatron name map. Each family module makes one table of these, without torch.

The same table serves conversion, direct start, export, weight sync and the plan's parameter counts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Join(enum.StrEnum):
    """How a Megatron parameter is made of its HF tensors."""

    SINGLE = "single"
    STACK = "stack"
    """Parts below each other on dim 0: gate over up (a tensor-parallel rank has its gate rows over its up rows)."""
    QKV = "qkv"
    """q, k, v interleaved by key-value group: [q of group 0, k 0, v 0, q of group 1, …]."""


class Where(enum.StrEnum):
    """The part of the model a parameter belongs to; decides its pipeline stage."""

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
    """Whether a block-fp8 checkpoint of this family stores it quantised (`modules_to_not_convert` decides last)."""
    aliases: tuple[str, ...] = ()
    """Further names of copies in a checkpoint (DeepSeek's MTP layer holds its own embedding and output head).

    A reader takes `name`; export and weight sync write the current values under every alias that the checkpoint has.
    """


@dataclass(frozen=True)
class Param:
    """One logical Megatron parameter or persistent buffer: whole, named as on a single process with global numbers."""

    name: str
    """`decoder.layers.{global layer}.mlp.experts.local_experts.{global expert}.linear_fc1.weight`; norms under their
    unfused name."""
    shape: tuple[int, ...]
    parts: tuple[HFTensor, ...]
    join: Join = Join.SINGLE
    tp_dim: int | None = None
    """Dimension that tensor parallelism (expert tensor parallelism for experts) splits; None is replicated."""
    where: Where = Where.DECODER
    layer: int | None = None
    """Global decoder layer, or number of the MTP layer."""
    expert: int | None = None
    """Global routed expert."""
    fp32: bool = False
    """Kept in fp32 whatever the training type (the router's expert bias)."""
    buffer: bool = False
    """A persistent buffer, not trained by the optimizer."""
    kv_groups: int | None = None
    """Key-value groups of a QKV join."""
