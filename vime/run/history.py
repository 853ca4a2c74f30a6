"""Facts about earlier starts of a run, read from its journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from vime.errors import Cause
from vime.run.journal import Event, last_start

ENDS = ("run-end", "job-end")
"""Kinds of a start's final event; `job-end` for all jobs of a chain but the last."""
MOST_CRASHES = 5
"""Consecutive starts that may end with CRASH before the run stops for good."""
MOST_FAILURES = 2
"""Failures of a node in one run after which the run leaves it out."""


def unfinished_start(events: list[Event]) -> Event | None:
    """`run-start` event of the last start if it has no final event."""
    last = last_start(events)
    if not last or last[0].kind != "run-start" or any(event.kind in ENDS for event in last):
        return None
    return last[0]


def was_stopping(events: list[Event]) -> bool:
    """True if the journal breaks off while the controller ended its stages: its own host was not lost then."""
    return bool(events) and (events[-1].kind, events[-1].text) == ("stage-end", "stopped")


def crashes(events: list[Event]) -> int:
    """Number of starts in a row that ended with CRASH and led to another, since a person started the run."""
    count = 0
    for event in events:
        if event.kind == "run-start" and not (event.data.get("restart") or event.data.get("attempt")):
            count = 0
        elif event.kind == "run-end":
            again = event.data.get("requeued") and event.data.get("cause") == Cause.CRASH.name
            count = count + 1 if again else 0
    return count


def node_failures(events: list[Event], name_of: Callable[[str], str] = str) -> Counter[str]:
    """Failures of each node in this run. `name_of` maps the names of a node to one."""
    ends = (event for event in events if event.kind == "run-end" and event.data.get("cause") == Cause.NODE_FAILURE.name)
    return Counter(name_of(event.node) for event in ends if event.node)


def failed_too_often(failures: Mapping[str, int]) -> list[str]:
    """Nodes that the run must leave out from now on."""
    return sorted(node for node, count in failures.items() if count >= MOST_FAILURES)
