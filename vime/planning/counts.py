"""Parameter counts by pipeline stage and by rank, from the name maps that also load and save the model."""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections import Counter
from dataclasses import dataclass

from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Param, Where
from vime.recipe.parallel import ParallelLayout


class Kind(enum.StrEnum):
    """Role of a parameter in the model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    DENSE = "dense MLP"
    ROUTED = "routed experts"
    SHARED = "shared experts"
    ROUTER = "router"
    NORM = "norms"
    MTP = "MTP layers"
    HEAD = "output head"


@dataclass(frozen=True)
class Counts:
    """Parameter elements of a part of the model, by how parallelism treats them."""

    split: int = 0
    """Sharded by tensor parallelism."""
    copied: int = 0
    """Replicated on every tensor-parallel rank."""
    experts: int = 0
    """Routed experts, sharded by expert and expert tensor parallelism."""
    buffers: int = 0
    """Persistent buffers (the router's bias), replicated on every rank, without gradient."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.split + other.split,
            self.copied + other.copied,
            self.experts + other.experts,
            self.buffers + other.buffers,
        )

    @property
    def total(self) -> int:
        """Every element once, buffers included."""
        return self.split + self.copied + self.experts + self.buffers

    def of_rank(self, layout: ParallelLayout) -> int:
        """Parameter elements that one rank holds, exactly as Megatron builds it."""
        return self.split // layout.tp + self.copied + self.experts // (layout.ep * layout.etp)

    def buffers_of_rank(self, layout: ParallelLayout) -> tuple[int, int]:
        """The same, split as Megatron's two buffers: dense parameters and experts."""
        experts = self.experts // (layout.ep * layout.etp)
        return self.of_rank(layout) - experts, experts

    def of_optimizer_rank(self, layout: ParallelLayout) -> int:
        """Elements whose optimizer state one rank keeps: its parameters, divided among their replicas."""
        dense = (self.split // layout.tp + self.copied) / (layout.dp * layout.cp)
        return math.ceil(dense + self.experts // (layout.ep * layout.etp) / layout.edp)


Parts = dict[Kind, Counts]


@dataclass(frozen=True)
class Tensors:
    """Equal-sized tensors of one rank."""

    elements: int
    """Elements per tensor."""
    number: int
    replicas: int
    """Ranks that hold the same tensor and divide its optimizer state."""


def summed(parts: Parts) -> Counts:
    """Sum over all kinds."""
    return functools.reduce(Counts.__add__, parts.values(), Counts())


@functools.lru_cache(maxsize=32)
def model_counts(config: ModelConfig) -> Counts:
    """Counts of the whole model, MTP layers included; a tied output head counts once."""
    return functools.reduce(
        Counts.__add__,
        (_counts(param, elements * (len(layers) or 1)) for param, elements, layers in _elements(config)),
    )


def stage_counts(config: ModelConfig, layout: ParallelLayout, *, mtp: bool) -> tuple[Counts, ...]:
    """Counts of each of the trainer's pipeline stages; MTP layers are built only to be trained (`mtp`)."""
    return tuple(summed(parts) for parts in stage_parts(config, layout, mtp=mtp))


def stage_parts(config: ModelConfig, layout: ParallelLayout, *, mtp: bool) -> tuple[Parts, ...]:
    """Counts of each of the trainer's pipeline stages, by kind.

    The last of several stages holds a second copy of the embedding if it needs one: as the output head of a tied
    model, or as the input of MTP layers.
    """
    stages: list[Parts] = []
    for rows in _stages(config, layout, mtp):
        parts: Parts = {}
        for (kind, how, size), number in rows.items():
            parts[kind] = parts.get(kind, Counts()) + Counts(**{how: size * number})
        stages.append(parts)
    return tuple(stages)


def stage_tensors(config: ModelConfig, layout: ParallelLayout, *, mtp: bool) -> tuple[tuple[Tensors, ...], ...]:
    """Parameter tensors that a rank of each pipeline stage holds, grouped by equal size."""

    def of_rank(how: str, size: int, number: int) -> Tensors:
        if how == "experts":
            return Tensors(size // layout.etp, number // layout.ep, layout.edp)
        return Tensors(size // (layout.tp if how == "split" else 1), number, layout.dp * layout.cp)

    return tuple(
        tuple(of_rank(how, size, number) for (_, how, size), number in rows.items() if how != "buffers")
        for rows in _stages(config, layout, mtp)
    )


def kind_of(param: Param) -> Kind:
    """Kind of a parameter; everything in an MTP layer has the MTP kind."""
    if param.where == Where.MTP:
        return Kind.MTP
    if param.where == Where.EMBEDDING:
        return Kind.EMBEDDING
    if param.expert is not None:
        return Kind.ROUTED
    for mark, kind in ((".router.", Kind.ROUTER), (".shared_experts.", Kind.SHARED), ("layernorm", Kind.NORM)):
        if mark in param.name:
            return kind
    if param.where == Where.HEAD:
        return Kind.HEAD
    return Kind.ATTENTION if ".self_attention." in param.name else Kind.DENSE


_Rows = dict[tuple[Kind, str, int], int]
"""Number of whole tensors, by kind, field of Counts and elements per tensor."""


def _stages(config: ModelConfig, layout: ParallelLayout, mtp: bool) -> tuple[_Rows, ...]:
    sizes = tuple(map(len, layout.stage_layers(config.num_layers)))
    return _stage_rows(config, layout.tp, sizes, mtp)


@functools.lru_cache(maxsize=256)
def _stage_rows(config: ModelConfig, tp: int, sizes: tuple[int, ...], mtp: bool) -> tuple[_Rows, ...]:
    """Tensors of pipeline stages with these numbers of layers."""
    stages: list[_Rows] = [{} for _ in sizes]
    copy_last = len(sizes) > 1 and (config.tie_word_embeddings or (mtp and config.mtp_layers > 0))
    of_layer = [stage for stage, size in enumerate(sizes) for _ in range(size)]

    def add(stage: int, kind: Kind, how: str, size: int, number: int) -> None:
        rows, key = stages[stage], (kind, how, size)
        rows[key] = rows.get(key, 0) + number

    for param, elements, layers in _elements(dataclasses.replace(config, vocab_size=config.padded_vocab_size(tp))):
        if param.where == Where.MTP and not mtp:
            continue
        size = math.prod(param.shape) if param.expert is not None else elements
        places = Counter(of_layer[layer] for layer in layers) if layers else {_end(param.where): 1}
        for stage, number in places.items():
            add(stage, kind_of(param), _how(param), size, number * (elements // size))
        if copy_last and param.where == Where.EMBEDDING:
            add(-1, Kind.HEAD if config.tie_word_embeddings else Kind.EMBEDDING, _how(param), size, 1)
    return tuple(stages)


def _end(where: Where) -> int:
    """Stage of parameters outside decoder layers: first for the embedding, last for head and MTP layers."""
    return 0 if where == Where.EMBEDDING else -1


def _how(param: Param) -> str:
    """Name of the field of Counts that a parameter counts in."""
    if param.buffer:
        return "buffers"
    if param.expert is not None:
        return "experts"
    return "split" if param.tp_dim is not None else "copied"


def _counts(param: Param, elements: int) -> Counts:
    return Counts(**{_how(param): elements})


@functools.lru_cache(maxsize=32)
def _elements(config: ModelConfig) -> tuple[tuple[Param, int, tuple[int, ...]], ...]:
    """Every parameter with its elements, and the decoder layers that have one like it; no layers elsewhere.

    One layer stands for all of its kind, and one of its experts for all of them: counting with one and with two experts
    gives the slope of everything that grows with their number (experts, router). So a model with tens of thousands of
    expert matrices is counted without listing them.
    """
    alike: dict[bool, list[int]] = {}
    for layer in range(config.num_layers):
        alike.setdefault(config.is_moe_layer(layer), []).append(layer)
    of_kind = [tuple(layers) for layers in alike.values()]
    small = dataclasses.replace(config, num_layers=len(alike))

    def layers_of(param: Param) -> tuple[int, ...]:
        return of_kind[param.layer or 0] if param.where == Where.DECODER else ()

    if config.moe is None:
        return tuple((param, math.prod(param.shape), layers_of(param)) for param in params_of(small))
    number, moe = config.moe.num_experts, dataclasses.replace(config.moe, layers=tuple(alike))
    one, two = (
        params_of(dataclasses.replace(small, moe=dataclasses.replace(moe, num_experts=experts))) for experts in (1, 2)
    )
    in_two = {param.name: math.prod(param.shape) for param in two}
    found = []
    for param in one:
        size = math.prod(param.shape)
        slope = size if param.expert is not None else in_two[param.name] - size
        found.append((param, size + (number - 1) * slope, layers_of(param)))
    return tuple(found)
