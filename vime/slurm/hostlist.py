"""Slurm's lists of host names, as `gpu[001-003,007],login1`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vime.errors import SchedulerError


def expand_hosts(nodelist: str) -> tuple[str, ...]:
    """Names of a list in its order; leading zeros are kept, a name may have several brackets. Raises SchedulerError."""
    return tuple(name for entry in _entries(nodelist) for name in _expand(entry))


def _entries(nodelist: str) -> Iterator[str]:
    """Entries between the commas that are outside brackets."""
    entry, depth = "", 0
    for character in nodelist:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            yield entry
            entry = ""
        else:
            entry += character
    if depth:
        raise SchedulerError(f"{nodelist!r} is not a list of hosts: a bracket is not closed")
    if entry:
        yield entry


def _expand(entry: str) -> Iterator[str]:
    begin, bracket, rest = entry.partition("[")
    if not bracket:
        yield entry
        return
    inside, _, end = rest.partition("]")
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise SchedulerError(f"{entry!r} is not a list of hosts: {part!r} is neither a number nor a range")
        first, last = match[1], match[2] or match[1]
        for number in range(int(first), int(last) + 1):
            for tail in _expand(end):
                yield f"{begin}{number:0{len(first)}d}{tail}"
