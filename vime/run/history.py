"""Facts about earlier starts of a run, read from its journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vime.errors import Cause
from vime.run.journal import Event, last_start

ENDS = ("run-end", "job-end")
"""The last word of a start; a job of a chain that is not the last one has the second."""
MOST_FAILURES = 2
"""A node that failed so often in one run is not used by it any more."""


def unfinished_start(events: list[Event]) -> Event | None:
    """The `run-start` of the last start, when it left no last word."""
    last = last_start(events)
    if not last or last[0].kind != "run-start" or any(event.kind in ENDS for event in last):
        return None
    return last[0]


def node_failures(events: list[Event]) -> Counter[str]:
    """Number of failures in this run, by host."""
    ends = (event for event in events if event.kind == "run-end" and event.node)
    return Counter(event.node for event in ends if event.node and event.data.get("cause") == Cause.NODE_FAILURE.name)


def failed_too_often(failures: Mapping[str, int]) -> list[str]:
    """Hosts that the run leaves out from now on."""
    return sorted(host for host, count in failures.items() if count >= MOST_FAILURES)
