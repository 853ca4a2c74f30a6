"""Parameter counts by pipeline stage and by rank, from the same name maps that load and save the model."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from vime.models.config import ModelConfig
from vime.models.families import params_of, stage_of
from vime.models.namemap import Param, Where
from vime.recipe.parallel import ParallelLayout


@dataclass(frozen=True)
class Counts:
    """Elements of the parameters of a part of the model, by how parallelism treats them."""

    split: int = 0
    """Cut by tensor parallelism."""
    copied: int = 0
    """Whole on every tensor-parallel rank."""
    experts: int = 0
    """Of routed experts: cut by expert and expert tensor parallelism."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.split + other.split, self.copied + other.copied, self.experts + other.experts)

    @property
    def total(self) -> int:
        """Each element once."""
        return self.split + self.copied + self.experts

    def of_rank(self, layout: ParallelLayout) -> int:
        """Elements one rank holds."""
        return self.split // layout.tp + self.copied + self.experts // (layout.ep * layout.etp)

    def of_optimizer_rank(self, layout: ParallelLayout) -> int:
        """Elements whose optimizer state one rank keeps: its share of what it holds, divided among its replicas."""
        dense = (self.split // layout.tp + self.copied) / (layout.dp * layout.cp)
        return math.ceil(dense + self.experts // (layout.ep * layout.etp) / layout.edp)


def model_counts(config: ModelConfig) -> Counts:
    """The whole model, MTP layers included; a tied output head counts once."""
    return functools.reduce(Counts.__add__, stage_counts(config, ParallelLayout()))


@functools.lru_cache(maxsize=32)
def stage_counts(config: ModelConfig, layout: ParallelLayout, *, mtp: bool = True) -> tuple[Counts, ...]:
    """What each pipeline stage holds, with or without the MTP layers.

    A tied output head is a second copy of the embedding on the last of several stages.
    """
    stages = [Counts()] * layout.pp
    for param, elements in _elements(config, layout.tp):
        if param.where == Where.MTP and not mtp:
            continue
        stage = stage_of(param, layout, config.num_layers)
        counts = _counts(param, elements)
        stages[stage] += counts
        if config.tie_word_embeddings and param.where == Where.EMBEDDING and layout.pp > 1:
            stages[-1] += counts
    return tuple(stages)


def _counts(param: Param, elements: int) -> Counts:
    if param.expert is not None:
        return Counts(experts=elements)
    return Counts(split=elements) if param.tp_dim is not None else Counts(copied=elements)


@functools.lru_cache(maxsize=32)
def _elements(config: ModelConfig, tp: int) -> tuple[tuple[Param, int], ...]:
    """Every parameter but one expert a layer instead of all, with its elements (for that expert: those of all).

    Counting with one and with two experts gives the slope of what grows with their number (experts, router), so that
    a model of tens of thousands of expert matrices is counted without listing them.
    """
    padded = dataclasses.replace(config, vocab_size=config.padded_vocab_size(tp))
    if padded.moe is None:
        return tuple((param, math.prod(param.shape)) for param in params_of(padded))
    number = padded.moe.num_experts
    one, two = (
        params_of(dataclasses.replace(padded, moe=dataclasses.replace(padded.moe, num_experts=experts)))
        for experts in (1, 2)
    )
    in_two = {param.name: math.prod(param.shape) for param in two}
    elements = []
    for param in one:
        size = math.prod(param.shape)
        slope = size if param.expert is not None else in_two[param.name] - size
        elements.append((param, size + (number - 1) * slope))
    return tuple(elements)
