"""Facts about earlier starts that a new start reads in the journal."""

from __future__ import annotations

from vime.run.history import crashes, failed_too_often, node_failures
from vime.run.journal import Event


def start(restart: int) -> Event:
    return Event(kind="run-start", data={"restart": restart})


def end(cause: str, *, node: str | None = None, requeued: bool = True) -> Event:
    return Event(kind="run-end", node=node, data={"cause": cause, "requeued": requeued})


def test_crashes_in_a_row_count_since_a_person_started_the_run() -> None:
    assert crashes([]) == 0
    earlier = [start(0), end("CRASH"), start(1), end("CRASH", requeued=False)]
    assert crashes(earlier) == 0
    row = [*earlier, start(0), end("CRASH"), start(1), end("CRASH")]
    assert crashes(row) == 2
    assert crashes([*row, start(2), end("TIME_LIMIT")]) == 0
    assert crashes([*row, start(2)]) == 2


def test_a_node_is_counted_under_one_name() -> None:
    events = [
        end("NODE_FAILURE", node="gpu007.example.org"),
        end("NODE_FAILURE", node="gpu007"),
        end("CRASH", node="a"),
    ]
    counts = node_failures(events, lambda node: node.partition(".")[0])
    assert counts == {"gpu007": 2}
    assert failed_too_often(counts) == ["gpu007"]
