"""Progress: a bar with bytes, rate and time left on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import io

import pytest

from vime.checkpoint import progress
from vime.checkpoint.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its only entry is the time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds(clock: list[float]) -> None:
    log = io.StringIO()
    work = Progress("cast:", 10 * 10**9, log)
    for _ in range(80):
        clock[0] += 0.125
        work.add(125 * 10**6)
    work.close()
    assert log.getvalue().splitlines() == [
        "cast:  50% 5.00 of 10.00 GB, 1.00 GB/s, 5 s left",
        "cast: 100% 10.00 of 10.00 GB, 1.00 GB/s, 10.0 s",
        "cast: 100% 10.00 of 10.00 GB, 1.00 GB/s, 10.0 s",
    ]


def test_a_terminal_gets_one_line_that_is_drawn_anew(clock: list[float]) -> None:
    terminal = Terminal()
    work = Progress("cast:", 4 * 10**9, terminal)
    for _ in range(4):
        clock[0] += 1
        work.add(10**9)
    work.close()
    drawn = terminal.getvalue()
    assert drawn.count("\n") == 1
    assert drawn.endswith("\n")
    bars = [bar.removesuffix("\x1b[K") for bar in drawn.rstrip("\n").split("\r")[1:]]
    assert bars[0] == "[######..................] cast:  25% 1.00 of 4.00 GB, 1.00 GB/s, 3 s left"
    assert bars[-1].startswith("[########################] cast: 100%")


def test_nothing_to_do_is_done(clock: list[float]) -> None:
    log = io.StringIO()
    Progress("cast:", 0, log).close()
    assert "100%" in log.getvalue()
