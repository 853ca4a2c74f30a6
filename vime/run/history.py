"""Facts about earlier starts of a run, read from its journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from vime.errors import Cause
from vime.run.journal import Event, last_start

ENDS = ("run-end", "job-end")
"""The last word of a start; a job of a chain that is not the last one has the second."""
MOST_CRASHES = 5
"""Starts in a row that may end with CRASH before the run is not started again."""
MOST_FAILURES = 2
"""A node that failed so often in one run is not used by it any more."""


def unfinished_start(events: list[Event]) -> Event | None:
    """The `run-start` of the last start, when it left no last word."""
    last = last_start(events)
    if not last or last[0].kind != "run-start" or any(event.kind in ENDS for event in last):
        return None
    return last[0]


def crashes(events: list[Event]) -> int:
    """How many starts in a row ended with CRASH and were followed by another, since a person started the run."""
    count = 0
    for event in events:
        if event.kind == "run-start" and not event.data.get("restart"):
            count = 0
        elif event.kind == "run-end":
            again = event.data.get("requeued") and event.data.get("cause") == Cause.CRASH.name
            count = count + 1 if again else 0
    return count


def node_failures(events: list[Event], name_of: Callable[[str], str] = str) -> Counter[str]:
    """How often each node failed in this run. `name_of` gives the one name of a node that has several."""
    ends = (event for event in events if event.kind == "run-end" and event.data.get("cause") == Cause.NODE_FAILURE.name)
    return Counter(name_of(event.node) for event in ends if event.node)


def failed_too_often(failures: Mapping[str, int]) -> list[str]:
    """Nodes that the run leaves out from now on."""
    return sorted(node for node, count in failures.items() if count >= MOST_FAILURES)
