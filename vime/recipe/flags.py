"""Flat option names to the groups of the recipe: the command line's flags and the YAML files' keys, read alike.

`--lr 1e-6` and `lr: 1e-6` name the field `optimizer.lr`; `--vllm-max-num-seqs 64` is `engine.vllm["max_num_seqs"]`;
a Megatron model flag (`--rotary-base 10000`) becomes `model.model_args["rotary_base"]`. Nothing else is accepted.
"""

from __future__ import annotations

import difflib
import functools
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from vime.errors import BadInput
from vime.recipe import tables
from vime.recipe.neighbours import ALWAYS_SO, NO_MATTER, NO_PLACE, RENAMED, advice
from vime.recipe.schema import Recipe

Kind = Literal["bool", "value", "list", "dict", "any"]
"""`any`: whatever words follow, which nothing reads."""
Setting = tuple[str, Any]
"""Name with underscores, without leading dashes, and value."""

_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}


@dataclass(frozen=True)
class Target:
    """Where a setting goes: a field of a group, or a key of an open mapping (`engine.vllm`, `model.model_args`)."""

    group: str
    """Empty for a setting that changes nothing."""
    field: str
    kind: Kind
    key: str | None = None
    optional: bool = False


def flag(name: str) -> str:
    """The flag's spelling on the command line."""
    return "--" + name.replace("_", "-")


@functools.cache
def recipe_options() -> dict[str, Target]:
    """Every option of the recipe by its name. Two groups never share one."""
    options: dict[str, Target] = {}
    for group, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, inner in field.annotation.model_fields.items():
                if name in options:
                    raise TypeError(f"option {name} is in the groups {options[name].group} and {group}")
                kind, optional = _kind(inner.annotation)
                options[name] = Target(group, name, kind, optional=optional)
    return options


def _kind(annotation: Any) -> tuple[Kind, bool]:
    """How an annotation is read from the command line, and whether it may be None."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        optional = len(members) < len(typing.get_args(annotation))
        annotation = members[0]
    origin = typing.get_origin(annotation) or annotation
    kinds: dict[Any, Kind] = {bool: "bool", list: "list", dict: "dict"}
    return kinds.get(origin, "value"), optional


def find_target(name: str, *, megatron: bool = False) -> Target:
    """Where the option `name` goes; BadInput for one that vime does not take, with the reason or the nearest name.

    `megatron`: take every flag that Megatron knows, also those that change nothing here.
    """
    options = recipe_options()
    if name in options:
        return options[name]
    if name.startswith("vllm_"):
        return _vllm_target(name.removeprefix("vllm_"))
    if name in tables.MEGATRON_MODEL_FLAGS:
        kind: Kind = "bool" if tables.MEGATRON_MODEL_FLAGS[name] == "bool" else "value"
        return Target("model", "model_args", kind, key=name)
    if name in ALWAYS_SO or name in NO_MATTER or (megatron and is_megatron(name)):
        return Target("", name, "any")
    if (here := advice(name)) is not None:
        raise BadInput(f"unknown option {flag(name)}: {here}")
    if is_megatron(name):
        raise BadInput(f"{flag(name)} is a flag of Megatron that vime does not use: leave it out")
    raise BadInput(f"unknown option {flag(name)}{_nearest(name)}")


def is_megatron(name: str) -> bool:
    """True for a flag of Megatron, also for the negation of one of its switches."""
    flags = tables.MEGATRON_FLAGS
    return name in flags or any(
        name.startswith(no) and flags.get(name.removeprefix(no)) == "bool" for no in ("no_", "disable_")
    )


def _vllm_target(name: str) -> Target:
    for owned in (name, name.removeprefix("no_")):
        if owned in tables.VLLM_OWNED:
            raise BadInput(f"{flag('vllm_' + name)} cannot be given: {tables.VLLM_OWNED[owned]}")
    if name.startswith("no_") and tables.VLLM_ARGS.get(name.removeprefix("no_")) == "bool":
        return Target("engine", "vllm", "bool", key=name)
    if name not in tables.VLLM_ARGS:
        raise BadInput(
            f"unknown option {flag('vllm_' + name)}: vLLM {tables.VLLM_VERSION} has no engine argument {name}"
            f"{_nearest('vllm_' + name)}"
        )
    kind: Kind = {"bool": "bool", "list": "list"}.get(tables.VLLM_ARGS[name], "value")  # type: ignore[assignment]
    return Target("engine", "vllm", kind, key=name)


def _nearest(name: str) -> str:
    """A hint for a name that nothing knows. vime's own options weigh more than Megatron's and vLLM's."""
    elsewhere = [*tables.MEGATRON_MODEL_FLAGS, *(f"vllm_{each}" for each in tables.VLLM_ARGS)]
    pools = (([*RENAMED, *NO_PLACE], 0.85, 0.1), (list(recipe_options()), 0.6, 0.15), (elsewhere, 0.75, 0.0))
    found = [
        (difflib.SequenceMatcher(None, name, near).ratio() + bonus, near)
        for names, cutoff, bonus in pools
        for near in difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    ]
    if not found:
        return ": python -m vime.submit --list-options prints them all (docs/recipes.md)"
    near = max(found)[1]
    here = advice(near)
    return f": did you mean {flag(near)}?" + (f" ({here})" if here else "")


def parse_flags(argv: Sequence[str], *, megatron: bool = False) -> Iterator[Setting]:
    """The settings of a flat command line (`--lr 1e-6 --colocate --no-bf16 --rollout-stop a b`), in order.

    A value is the next argument, or stands after `=`; a list takes all arguments up to the next flag. `megatron`: take
    every flag that Megatron knows.
    """
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--") or word == "--":
            raise BadInput(f"unexpected argument {word!r}: options are written --name value")
        name, equals, given = word.removeprefix("--").partition("=")
        name, target, negated = _read_name(name.replace("-", "_"), megatron)
        values = [given] if equals else []
        if not equals:
            while position < len(argv) and not argv[position].startswith("--"):
                values.append(argv[position])
                position += 1
        yield name, _read_value(name, target, values, negated)


def _read_name(name: str, megatron: bool) -> tuple[str, Target, bool]:
    """The option a flag names; `--no-…` of a boolean option is that option, negated."""
    positive = name.removeprefix("no_") if name.startswith("no_") else None
    if positive is None and name.startswith("vllm_no_"):
        positive = "vllm_" + name.removeprefix("vllm_no_")
    known_as_written = name in recipe_options() or name in tables.MEGATRON_MODEL_FLAGS
    if positive and not known_as_written:
        is_vllm = tables.VLLM_ARGS.get(positive.removeprefix("vllm_")) if positive.startswith("vllm_") else None
        recipe = recipe_options().get(positive)
        if is_vllm == "bool" or (recipe and recipe.kind == "bool"):
            return positive, find_target(positive), True
    return name, find_target(name, megatron=megatron), False


def _read_value(name: str, target: Target, values: list[str], negated: bool) -> Any:
    if target.kind == "bool":
        if not values:
            return not negated
        if len(values) == 1 and not negated and values[0].lower() in _TRUE | _FALSE:
            return values[0].lower() in _TRUE
        raise BadInput(f"{flag(name)} is a switch and takes no value, given {values[0]!r}")
    if target.kind == "any":
        return " ".join(values) or True
    if target.kind == "list":
        parsed = _json(values[0]) if len(values) == 1 else None
        return parsed if isinstance(parsed, list) else values
    if target.kind == "dict":
        return _read_mapping(name, values)
    if len(values) != 1:
        raise BadInput(f"{flag(name)} takes one value, given {' '.join(values) or 'none'}")
    if target.key is not None:
        return _json(values[0])
    return None if target.optional and values[0].lower() in _NONE else values[0]


def _read_mapping(name: str, values: list[str]) -> dict[str, Any]:
    """`KEY=VALUE …` or one JSON object."""
    if len(values) == 1 and isinstance(whole := _json(values[0]), dict):
        return whole
    pairs = [value.partition("=") for value in values]
    if not pairs or any(not separator for _, separator, _ in pairs):
        raise BadInput(f"{flag(name)} takes KEY=VALUE, given {' '.join(values) or 'none'}")
    return {key: value for key, _, value in pairs}


def _json(text: str) -> Any:
    """The JSON value that the text is, otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_mapping(mapping: Mapping[Any, Any]) -> Iterator[Setting]:
    """The settings of a flat YAML mapping; dashes and underscores in names are the same."""
    for key, value in mapping.items():
        yield str(key).replace("-", "_"), value


def collect(settings: Iterable[Setting], into: dict[str, dict[str, Any]]) -> list[str]:
    """Writes settings into `into` (group -> field -> value); a later one wins, mappings are merged by key.

    Returns a note for every setting that changes nothing.
    """
    notes, no_matter = [], []
    for name, value in settings:
        target = find_target(name)
        if not target.group:
            if name in ALWAYS_SO:
                notes.append(f"{flag(name)} changes nothing: {ALWAYS_SO[name]}")
            else:
                no_matter.append(flag(name))
            continue
        fields = into.setdefault(target.group, {})
        if target.key is not None:
            fields[target.field] = {**fields.get(target.field, {}), target.key: value}
        elif target.kind == "dict":
            if not isinstance(value, Mapping):
                raise BadInput(f"{flag(name)} is {value!r}: give a mapping")
            fields[target.field] = {**fields.get(target.field, {}), **value}
        else:
            fields[target.field] = value
    if no_matter:
        notes.append(f"without effect, since vime chooses how it is computed: {', '.join(no_matter)}")
    return notes
