"""A sweep: one command line and its variants, from a YAML file. Pure except for reading the file."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vime.errors import BadInput
from vime.recipe.flags import flag

KEYS = ("name", "submit", "flags", "at-once", "grid", "zip", "list")
MOST = 1000
"""Largest number of variants in a sweep."""


@dataclass(frozen=True)
class Variant:
    """One run of a sweep."""

    name: str
    """Index `000`, `001`, …; the run's name is that of the sweep with this one."""
    options: Mapping[str, Any]
    """Recipe options that distinguish the variant."""

    def flags(self) -> list[str]:
        """The options as command-line words: true and false become `--x` and `--no-x`, a list several words."""
        words: list[str] = []
        for name, value in self.options.items():
            if isinstance(value, bool):
                words.append(flag(name) if value else f"--no-{flag(name)[2:]}")
            else:
                words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
        return words

    def label(self) -> str:
        return " ".join(self.flags())


@dataclass(frozen=True)
class Sweep:
    """Content of a sweep's file."""

    name: str
    submit: tuple[str, ...]
    """Options of vime.submit for all variants."""
    flags: tuple[str, ...]
    """Recipe flags for all variants; a variant's own follow them."""
    at_once: int | None
    """Largest number of runs active at once; None: as many as the scheduler starts."""
    variants: tuple[Variant, ...]


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep. Raises BadInput for an invalid file, naming the wrong key."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadInput(f"cannot read the sweep {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise BadInput(f"the sweep {path} holds no keys: give some of {', '.join(KEYS)}")
    if unknown := sorted(map(str, content.keys() - set(KEYS))):
        raise BadInput(f"{path}: {unknown[0]} is unknown: give {', '.join(KEYS)}")
    at_once = content.get("at-once")
    if at_once is not None and (not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1):
        raise BadInput(f"{path}: at-once is {at_once!r}: give a number of at least 1")
    name = content.get("name", Path(path).stem)
    if not isinstance(name, str) or not name or "/" in name or name.startswith(".") or not name.isprintable():
        raise BadInput(f"{path}: name is {name!r}: give a name that can be a folder's")
    submit, flags = (_words(content.get(key, []), f"{path}: {key}") for key in ("submit", "flags"))
    if "--" in submit:
        raise BadInput(f"{path}: submit holds --: flags of the recipe stand under flags")
    parts = [
        _grid(content.get("grid", {}), f"{path}: grid"),
        _zipped(content.get("zip", {}), f"{path}: zip"),
        _listed(content.get("list", []), f"{path}: list"),
    ]
    return Sweep(name, submit, flags, at_once, combine(parts, str(path)))


def combine(parts: Sequence[Sequence[Mapping[str, Any]]], where: str) -> tuple[Variant, ...]:
    """All combinations of one entry from each part; empty parts add nothing. Raises BadInput for repeated options."""
    filled = [part for part in parts if part]
    if not filled:
        raise BadInput(f"{where} has no variants: give grid, zip or list")
    count = 1
    for part in filled:
        count *= len(part)
    if count > MOST:
        raise BadInput(f"{where} has {count} variants: give at most {MOST}")
    found = []
    for number, chosen in enumerate(itertools.product(*filled)):
        options: dict[str, Any] = {}
        for entry in chosen:
            if twice := sorted(options.keys() & entry.keys()):
                raise BadInput(f"{where}: {twice[0]} stands in two of grid, zip and list: give it in one")
            options |= entry
        found.append(Variant(f"{number:03d}", options))
    return tuple(found)


def _words(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if isinstance(value, list) and all(isinstance(word, str | int | float) for word in value):
        return tuple(map(str, value))
    raise BadInput(f"{where} is {value!r}: give a line of words, or a list of them")


def _columns(value: Any, where: str) -> dict[str, list[Any]]:
    """Options and their values, with dashes in the names as in flags."""
    if not isinstance(value, dict):
        raise BadInput(f"{where} is {value!r}: give options, each with a list of values")
    for name, values in value.items():
        if not isinstance(values, list) or not values:
            raise BadInput(f"{where}: {name} is {values!r}: give a list of values")
    return {_option(name): values for name, values in value.items()}


def _option(name: Any) -> str:
    return str(name).removeprefix("--").replace("-", "_")


def _grid(value: Any, where: str) -> list[dict[str, Any]]:
    columns = _columns(value, where)
    return [dict(zip(columns, row, strict=True)) for row in itertools.product(*columns.values())] if columns else []


def _zipped(value: Any, where: str) -> list[dict[str, Any]]:
    columns = _columns(value, where)
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise BadInput(f"{where} has lists of different lengths ({lengths}): give lists of one length")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _listed(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadInput(f"{where} is {value!r}: give a list, each entry with options and their values")
    return [{_option(name): setting for name, setting in entry.items()} for entry in value]
