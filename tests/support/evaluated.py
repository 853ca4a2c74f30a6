"""Folders of evaluations as their jobs leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vime.run.evaluations import Result, evaluation_folder, write_result
from vime.run.journal import Journal
from vime.system.private import private_folder


def evaluated(run: Path, number: int, value: float, weights_time: float = 1e12) -> Path:
    """An evaluation of the checkpoint after rollout `number` that gave `eval/aime` this value."""
    private_folder(run / "evaluations")
    folder = private_folder(evaluation_folder(run, number))
    write_result(folder, Result(number, {"eval/aime": value}, weights_time))
    return folder


def ended(folder: Path, **data: Any) -> Path:
    """An evaluation without a result, whose journal ends with this."""
    private_folder(folder.parent)
    private_folder(folder)
    journal = Journal(folder)
    journal.write("run-start", "")
    journal.write("run-end", "an engine died", data=data)
    journal.close()
    return folder
