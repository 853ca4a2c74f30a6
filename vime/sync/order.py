"""Order of a weight sync's tensors, and their division into buckets."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from vime.fp8.format import is_quantised
from vime.models.config import ModelConfig, Quantisation
from vime.models.families import params_of
from vime.models.namemap import Param, Where
from vime.recipe.parallel import ParallelLayout
from vime.sync.parts import OPEN_BUCKETS, Entry, Receiver, _scale_bytes, padded


def _policy(
    config: ModelConfig, expert_turns: Mapping[int, int], layer_turns: Sequence[tuple[int, int]]
) -> Iterator[Entry]:
    """Entries of the engine's policy model, from the embedding to the head: everything except MTP layers.

    Layers of equal turns are interleaved: first the non-expert tensors of each, then the first expert of each, …
    """
    place = {Where.EMBEDDING: 0, Where.DECODER: 1, Where.HEAD: 2}
    seen: Counter[tuple[Where, int | None, int | None]] = Counter()
    ordered: list[tuple[tuple[int, tuple[int, int], int, int, int], Param]] = []
    for param in params_of(config):
        if param.where in place:
            expert = -1 if param.expert is None else expert_turns[param.expert]
            turn = (0, 0) if param.layer is None else layer_turns[param.layer]
            owner = (param.where, param.layer, param.expert)
            ordered.append(((place[param.where], turn, expert, param.layer or 0, seen[owner]), param))
            seen[owner] += 1
    for _, param in sorted(ordered, key=operator.itemgetter(0)):
        for part in range(len(param.parts)):
            yield _entry(config, param, part, param.parts[part].name)


def _layer_turns(
    config: ModelConfig, layout: ParallelLayout, receivers: Sequence[Receiver], limit: int
) -> list[tuple[int, int]]:
    """Turn of each decoder layer, (index in its stage, group of stages): each stage's first layer, then each second.
    OPEN_BUCKETS limits the groups, because engines hold all layers of one turn in memory at once."""
    stages = layout.stage_layers(config.num_layers)
    sizes = [0] * len(receivers)
    for param in params_of(config):
        if param.where == Where.DECODER and param.layer == config.num_layers - 1:
            for part in range(len(param.parts)):
                entry = _entry(config, param, part, param.parts[part].name)
                for number, receiver in enumerate(receivers):
                    sizes[number] += entry.bytes * receiver.needs(entry)
    together = max(1, OPEN_BUCKETS * limit // max(1, *sizes))
    turns = [(0, 0)] * config.num_layers
    for stage, layers in enumerate(stages):
        for number, layer in enumerate(layers):
            turns[layer] = (number, stage // together)
    return turns


def _expert_turns(config: ModelConfig, layout: ParallelLayout, receivers: Sequence[Receiver]) -> dict[int, int]:
    """Turn of each expert: its index among the experts with the same source and receiver."""
    experts = config.moe.num_experts if config.moe is not None else 0
    first: dict[int, int] = {}
    for number, receiver in enumerate(receivers):
        for expert in range(experts) if receiver.experts is None else receiver.experts:
            first.setdefault(expert, number)
    turns: dict[int, int] = {}
    taken: Counter[tuple[int, int | None]] = Counter()
    for expert in range(experts):
        way = (expert // (experts // layout.ep), first.get(expert))
        turns[expert] = taken[way]
        taken[way] += 1
    return turns


def _draft(config: ModelConfig, trained: bool) -> Iterator[Entry]:
    """Entries of the MTP draft model: its layers, and the shared embedding and head under their names there."""
    for param in params_of(config):
        for part, tensor in enumerate(param.parts):
            if param.where == Where.MTP:
                yield _entry(config, param, part, tensor.name, frozen=not trained)
            elif param.where in (Where.EMBEDDING, Where.HEAD):
                for alias in tensor.aliases:
                    yield _entry(config, param, part, alias)


def _entry(config: ModelConfig, param: Param, part: int, name: str, frozen: bool = False) -> Entry:
    quantised = is_quantised(name, param.parts[part].quantised, config.quantisation)
    return Entry(name, param, part, "float8_e4m3fn" if quantised else "float32" if param.fp32 else "bfloat16", frozen)


def _fill(
    entries: Iterator[Entry], receivers: Sequence[Receiver], limit: int, quantisation: Quantisation | None
) -> Iterator[list[Entry]]:
    block = quantisation.block if quantisation else (128, 128)
    group: list[Entry] = []
    filled = [0] * len(receivers)
    for entry in entries:
        size = padded(entry.bytes) + (padded(_scale_bytes(entry, block)) if entry.quantised else 0)
        after = [used + size * receiver.needs(entry) for used, receiver in zip(filled, receivers, strict=True)]
        if group and max(after, default=0) > limit:
            yield group
            group, after = [], [size * receiver.needs(entry) for receiver in receivers]
        group.append(entry)
        filled = after
    if group:
        yield group
