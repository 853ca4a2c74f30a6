"""Division of a node's cores between the programs of the tool `python` and all else, and how many programs they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vime.errors import BadInput
from vime.recipe.schema import AgentOptions

SHARE = 8
"""By default programs get one of so many cores."""
PROGRAMS_PER_CORE = 2
"""Programs that run at once on a node, for each of its cores that they may use: some of them wait."""
PROGRAMS = 4
"""Programs that run at once on a node whose cores are not known."""


@dataclass(frozen=True)
class Cores:
    """Cores of a node; the same ones in both where none are set aside."""

    programs: tuple[int, ...]
    others: tuple[int, ...]
    """Cores by which engines and trainer count their threads."""


def divide(options: AgentOptions, cores: Sequence[int]) -> Cores:
    """Set the last ones aside for programs. Raises BadInput where no others are left."""
    first = len(cores) - set_aside(options, len(cores))
    return Cores(tuple(cores[first:] or cores), tuple(cores[:first]))


def set_aside(options: AgentOptions, cores: int) -> int:
    """Number of a node's cores that only programs get. Raises BadInput where no others are left."""
    if not options.runs_python:
        return 0
    wanted = cores // SHARE if options.tool_cores is None else options.tool_cores
    if wanted and wanted >= cores:
        raise BadInput(f"--tool-cores is {wanted}, and a node has {cores} cores: leave some to engines and trainer")
    return wanted


def programs_at_once(options: AgentOptions, cores: int | None) -> int:
    """Programs that run at once on a node of so many cores (None: not known), 0 where the recipe runs none.

    Raises BadInput where no cores are left to others.
    """
    if not options.runs_python:
        return 0
    if options.tool_programs is not None:
        return options.tool_programs
    if cores is None:
        return PROGRAMS_PER_CORE * options.tool_cores if options.tool_cores else PROGRAMS
    return PROGRAMS_PER_CORE * (set_aside(options, cores) or cores)
