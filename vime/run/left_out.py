"""Prompts that a run leaves out after a set-back, `<run>/left-out.json`: what was trained on when training spiked."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from vime.errors import DataError
from vime.system.files import PRIVATE, read_json, write_json

LEFT_OUT = "left-out.json"

Row = tuple[str, int]
"""Name of the prompt set, and row in it from 0."""


def set_backs(run_dir: str | Path) -> list[dict[str, Any]]:
    """Every set-back so far: `rollout`, `why` and `prompts`. Raises DataError if the file is damaged."""
    path = Path(run_dir) / LEFT_OUT
    found = read_json(path)
    if found is None and path.exists():
        raise DataError(f"{path} is damaged: remove it to train on all prompts again")
    return found or []


def left_out(run_dir: str | Path) -> frozenset[Row]:
    """Rows that the run leaves out. Raises DataError if the file is damaged."""
    return frozenset((name, number) for each in set_backs(run_dir) for name, number in each["prompts"])


def leave_out(run_dir: str | Path, rollout_id: int, why: str, rows: Collection[Row]) -> None:
    """Leave out rows from the next start on."""
    entry = {"rollout": rollout_id, "why": why, "prompts": sorted(map(list, rows))}
    write_json(Path(run_dir) / LEFT_OUT, [*set_backs(run_dir), entry], mode=PRIVATE)
