"""Prompt, label and metadata of a row, by the columns that the recipe names; a path (`a.b`) reaches a nested column."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vime.data.files import Row
from vime.errors import BadInput
from vime.recipe.schema import Recipe
from vime.rewards.names import BUILT_IN, GROUP_PREFIX

_SHOWN_COLUMNS = 12


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are read, and whether the reward cannot do without a label."""

    prompt: str = "prompt"
    label: str = "label"
    metadata: str = "metadata"
    reward: str | None = None
    """`--rm-type`; a built-in reward needs a label in every row."""

    @classmethod
    def of(cls, recipe: Recipe) -> Columns:
        options = recipe.rollout
        return cls(options.input_key, options.label_key, options.metadata_key, options.rm_type)


@dataclass(frozen=True)
class Cells:
    """Cells of a row that are used."""

    prompt: Any
    """Chat messages or text."""
    label: Any
    metadata: dict[str, Any]


def read_cells(row: Row, columns: Columns) -> Cells:
    """The row's cells, checked. Raises BadInput that names row and column."""
    prompt = _prompt(row, columns.prompt)
    metadata = _metadata(row, columns.metadata)
    label = cell(row.cells, columns.label)
    reward = _reward(row, metadata, columns)
    if reward in BUILT_IN and _is_absent(label):
        why = "is null" if label is None and has(row.cells, columns.label) else "is empty" if label is not None else ""
        said = f"{columns.label!r} {why}" if why else f"has no {columns.label!r} (it has {_names(row.cells)})"
        raise BadInput(f"{row.where}: {said}, and --rm-type {reward} needs a label: set --label-key, or fix the row")
    check_text(row.where, columns.label, label)
    check_text(row.where, columns.metadata, metadata)
    return Cells(prompt, label, metadata)


def cell(cells: Mapping[str, Any], path: str) -> Any:
    """The value under a column's name, or under a path of names joined by dots; None where there is none."""
    if path in cells:
        return cells[path]
    value: Any = cells
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


def has(cells: Mapping[str, Any], path: str) -> bool:
    """True where the column or path is there, even if its value is null."""
    *parents, name = path.split(".")
    parent = cell(cells, ".".join(parents)) if parents else cells
    return path in cells or (isinstance(parent, Mapping) and name in parent)


def _names(cells: Mapping[str, Any]) -> str:
    names = sorted(cells)
    return ", ".join(names[:_SHOWN_COLUMNS]) + (
        f" and {len(names) - _SHOWN_COLUMNS} more" * (len(names) > _SHOWN_COLUMNS)
    )


def _is_absent(label: Any) -> bool:
    return label is None or (isinstance(label, str) and not label.strip()) or label == []


def _prompt(row: Row, name: str) -> Any:
    prompt = cell(row.cells, name)
    if prompt is None:
        raise BadInput(f"{row.where} has no {name!r} (it has {_names(row.cells)}): set --input-key")
    if isinstance(prompt, list):
        if not prompt or not all(map(is_turn, prompt)):
            raise BadInput(f"{row.where}: {name!r} has to be chat messages with role and content, or text")
    elif not isinstance(prompt, str):
        raise BadInput(f"{row.where}: {name!r} is a {type(prompt).__name__}: it has to be chat messages or text")
    elif not prompt:
        raise BadInput(f"{row.where}: {name!r} is empty: there is nothing to answer; remove the row")
    check_text(row.where, name, prompt)
    return prompt


def is_turn(turn: Any) -> bool:
    """True for a chat message: a role, and a content that is text or a list of parts."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return False
    content = turn.get("content")
    return isinstance(content, (str, list)) or (content is None and bool(turn.get("tool_calls")))


def _metadata(row: Row, name: str) -> dict[str, Any]:
    metadata = cell(row.cells, name)
    if isinstance(metadata, str):
        if not metadata.strip():
            return {}
        try:
            metadata = json.loads(metadata)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{row.where}: {name!r} is text that is not JSON: {str(error)[:100]}") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise BadInput(f"{row.where}: {name!r} is a {type(metadata).__name__}: it has to be an object")
    return dict(metadata or {})


def _reward(row: Row, metadata: Mapping[str, Any], columns: Columns) -> str | None:
    """The built-in name that the row chooses, else that of the recipe."""
    own = metadata.get("rm_type")
    if own is None or columns.reward is None or columns.reward.startswith(GROUP_PREFIX):
        return columns.reward
    if own not in BUILT_IN:
        known = ", ".join(BUILT_IN)
        raise BadInput(f"{row.where}: {columns.metadata!r} has rm_type {str(own)[:60]!r}, which is none of {known}")
    return str(own)


def check_text(where: str, name: str, value: Any) -> None:
    """BadInput for text that UTF-8 cannot hold (half of a surrogate pair), however deeply it is nested."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            if not each.isascii() and (place := _lone_surrogate(each)) is not None:
                raise BadInput(
                    f"{where}: {name!r} has half of a surrogate pair (\\u{ord(each[place]):04x} at character "
                    f"{place + 1}), which is not text: fix or remove the row"
                )
        elif isinstance(each, Mapping):
            waiting += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple)):
            waiting += each


def _lone_surrogate(text: str) -> int | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


Length = Callable[[Any], int]


def characters(prompt: Any) -> int:
    """Characters of a prompt, without the chat template's."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(turn["content"]) if isinstance(turn["content"], str) else 0 for turn in prompt)
