"""Prompt sets as the recipe names them: `--prompt-data name=path:weight …` and `--eval-prompt-data name path …`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vime.errors import BadInput
from vime.recipe.schema import Recipe

_NAMED = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)=(?P<path>.+)", re.DOTALL)
_WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)", re.DOTALL)


@dataclass(frozen=True)
class PromptSource:
    """A file or folder of prompts."""

    name: str
    path: str
    weight: float = 1.0
    """Share of the training prompts, relative to the other sources."""
    flag: str = "--prompt-data"


def training_sources(values: Sequence[str]) -> tuple[PromptSource, ...]:
    """The sources of `--prompt-data`: one path, or `name=path` or `name=path:weight` each. Raises BadInput."""
    sources = tuple(_training_source(value, alone=len(values) == 1) for value in values)
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise BadInput(f"--prompt-data {' '.join(values)}: two sets have the same name")
    return sources


def _training_source(value: str, *, alone: bool) -> PromptSource:
    named = _NAMED.fullmatch(value)
    if not named:
        if not alone:
            raise BadInput(f"--prompt-data {value}: several sets are written name=path or name=path:weight")
        return PromptSource(Path(value).name.split(".")[0] or "prompts", value)
    path, weight = named["path"], 1.0
    if weighted := _WEIGHTED.fullmatch(path):
        path = weighted["path"]
        try:
            weight = float(weighted["weight"])
        except ValueError:
            weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise BadInput(f"--prompt-data {value}: the weight after the colon has to be a number above 0")
    return PromptSource(named["name"], path, weight)


def with_paths(values: Sequence[str], convert: Callable[[str], str]) -> list[str]:
    """`--prompt-data` with every path converted; a set's weight is written out, so that its path may hold a colon."""
    return [
        convert(value) if source.path == value else f"{source.name}={convert(source.path)}:{source.weight:g}"
        for value, source in zip(values, training_sources(values), strict=True)
    ]


def evaluation_sources(values: Sequence[str]) -> tuple[PromptSource, ...]:
    """The sources of `--eval-prompt-data`: name and path in turn. Raises BadInput."""
    if len(values) % 2:
        raise BadInput(f"--eval-prompt-data is {' '.join(values)}: give a name and a path in turn")
    pairs = zip(values[::2], values[1::2], strict=True)
    return tuple(PromptSource(name, path, flag="--eval-prompt-data") for name, path in pairs)


def all_sources(recipe: Recipe) -> tuple[PromptSource, ...]:
    """Every prompt set of a recipe, training first."""
    return training_sources(recipe.rollout.prompt_data) + evaluation_sources(recipe.eval.eval_prompt_data)
