"""The journal: one writer that survives a crash of the one before, one reader that sees whole lines only."""

import os
import time
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vime.run.journal import EVENTS_FILE, Journal, last_start, read_events


def test_events_are_read_in_order_with_everything_they_say(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write("run-start", "attempt 0")
    journal.write("stage-end", "exit code 3", stage="train", node="node01", rank=2, data={"tail": ["a", "b"]})
    journal.close()
    written = time.time()
    first, second = read_events(tmp_path)
    assert (first.kind, first.text) == ("run-start", "attempt 0")
    assert (second.stage, second.node, second.rank, second.data) == ("train", "node01", 2, {"tail": ["a", "b"]})
    assert first.time <= second.time <= written


def test_a_run_without_a_journal_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []


def test_the_journal_is_its_owners_alone(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    assert (tmp_path / EVENTS_FILE).stat().st_mode & 0o777 == 0o600


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=5), cut=st.integers(0, 60))
def test_a_torn_last_line_costs_only_itself(tmp_path: Path, texts: list[str], cut: int) -> None:
    path = tmp_path / EVENTS_FILE
    path.unlink(missing_ok=True)
    journal = Journal(tmp_path)
    for text in texts:
        journal.write("signal", text, sync=False)
    journal.close()
    lines = path.read_bytes().splitlines(keepends=True)
    keep = min(cut, len(lines[-1]) - 1)
    os.truncate(path, path.stat().st_size - len(lines[-1]) + keep)

    whole = texts[:-1] if keep < len(lines[-1]) - 1 else texts
    assert [event.text for event in read_events(tmp_path)] == whole
    journal = Journal(tmp_path)
    journal.write("run-end", "after")
    journal.close()
    assert [event.text for event in read_events(tmp_path)] == [*whole, "after"]


def test_last_start_leaves_out_what_happened_before_a_requeue(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for kind in ("run-start", "requeue", "run-start", "stage-start"):
        journal.write(kind, sync=False)
    journal.close()
    assert [event.kind for event in last_start(read_events(tmp_path))] == ["run-start", "stage-start"]
