"""vime.top: a page of numbers and texts, of which nothing reaches the terminal but what it shows."""

import io
import os
import pty
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.support import patience
from tests.support.synthetic import HOSTILE, synthetic_run
from vime import logs, status
from vime.observe.top import VIEWS, Reader, Snapshot, page, sparkline
from vime.run.journal import Event
from vime.run.logs import Line, LogFile
from vime.run.state import RunState, StageState
from vime.run.usage import GpuUsage, NodeUsage
from vime.system.processes import start_ticks
from vime.system.text import visible
from vime.top import main

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202e[red]"


def drawn(snapshot, view, width=100, height=40):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False, highlight=False)
    console.print(page(snapshot, view, width, height))
    return console.file.getvalue()


def snapshot(tmp_path):
    state = RunState(ESCAPE, str(tmp_path), "running", job=ESCAPE, reason=ESCAPE, hosts=[ESCAPE])
    state.stages = [StageState(ESCAPE, "running", 12.0)]
    gpus = (GpuUsage(0, 87.0, 60e9, 80e9, 71.0), GpuUsage(1, None, None, None, None))
    return Snapshot(
        state=state,
        steps={number: {"rollout/raw_reward": number / 10} for number in range(30)},
        events=[Event(time=1.7e9, kind="checkpoint", node=ESCAPE, text=f"{ESCAPE}\nsecond line")],
        nodes=[NodeUsage(0, time.time(), 3.5, 96, 1e11, 2e12, gpus)],
        queues=[[3, 4], [0, 0]],
        lines=[Line("2026-11-24 12:00:00.000", LogFile("train", 0, None, tmp_path), f"{ESCAPE} loss")],
    )


@pytest.mark.parametrize("view", VIEWS)
def test_no_control_character_of_others_reaches_the_terminal(view, tmp_path):
    text = drawn(snapshot(tmp_path), view)
    assert not {c for c in text if visible(c) != c}
    assert "\\u001b" in text


def test_markup_in_a_text_is_text(tmp_path):
    assert "[red]" in drawn(snapshot(tmp_path), "events", width=160)


def test_the_overview_shows_stages_curves_queues_events_and_logs(tmp_path):
    text = drawn(snapshot(tmp_path), "overview")
    assert "12 s" in text
    assert "reward" in text
    assert "▁" in text
    assert "█" in text
    assert "0: 7  1: 0" in text
    assert "loss" in text


def test_the_nodes_show_use_memory_and_temperature(tmp_path):
    text = drawn(snapshot(tmp_path), "nodes", width=160)
    assert "3.5 of 96" in text
    assert "87 -" in text
    assert "60 GB of 80 GB" in text
    assert "71 °C" in text


@given(st.lists(st.floats(-1e6, 1e6), max_size=300), st.integers(1, 80))
def test_a_sparkline_fits_its_width_and_shows_the_highest(values, width):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    if values and len(values) <= width and max(values) > min(values):
        assert line[values.index(max(values))] == "█"
        assert line[values.index(min(values))] == "▁"


def test_without_a_terminal_a_page_is_printed_once(tmp_path, capsys):
    run = synthetic_run(tmp_path, 5)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"time": 1.7e9, "kind": "signal", "text": "\\u001b[31mred"}\n')
    for view in VIEWS:
        assert main([str(run), "--view", view]) == 0
        said = capsys.readouterr().out
        assert "\x1b" not in said
        assert "\u202e" not in said
    assert HOSTILE not in said


def test_logs_are_read_on_and_not_again(tmp_path):
    run = synthetic_run(tmp_path, 1)
    log = run / "logs" / "train" / "node00.log"
    log.parent.mkdir(parents=True)
    log.write_text("2026-11-24 12:00:00.000 one\n")
    reader = Reader(run)
    assert [line.text for line in reader.read().lines] == ["one"]
    with log.open("a") as file:
        file.write("2026-11-24 12:00:01.000 two\n")
    assert [line.text for line in reader.read().lines] == ["one", "two"]


@pytest.mark.e2e
class Terminal:
    """vime.top on a terminal of its own, of a run that counts as running until its journal ends."""

    def __init__(self, folder):
        self.run = synthetic_run(folder, 5)
        start, *_, self.end = (self.run / "events.jsonl").read_text().splitlines(keepends=True)
        # A start in a job that nobody can ask about counts as running.
        host, ticks = os.uname().nodename, start_ticks(os.getpid())
        alive = f'"host": "{host}", "pid_start": {ticks}, "pid": {os.getpid()}'
        (self.run / "events.jsonl").write_text(start.replace('"job": "4711"', alive))
        self._leader, follower = pty.openpty()
        command = [sys.executable, "-m", "vime.top", str(self.run), "--every", "0.3"]
        self.process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, close_fds=True)
        os.close(follower)
        self.said = b""

    def until(self, words):
        deadline = time.monotonic() + patience.PROCESS
        while words not in self.said:
            assert time.monotonic() < deadline, self.said[-2000:]
            self.said += os.read(self._leader, 65536)

    def press(self, key):
        os.write(self._leader, key)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


@pytest.fixture
def terminal(tmp_path):
    shown = Terminal(tmp_path)
    yield shown
    shown.close()


def test_keys_switch_the_page_and_the_terminal_is_as_before(terminal):
    terminal.until(b"curves")
    terminal.press(b"2")
    terminal.until(b"No node has written")
    terminal.press(b"q")
    assert terminal.process.wait(patience.PROCESS) == 0


def test_it_ends_with_the_run_and_leaves_the_last_page(terminal):
    terminal.until(b"curves")
    with (terminal.run / "events.jsonl").open("a") as journal:
        journal.write(terminal.end)
    # The screen of before comes back, and the page is printed on it.
    terminal.until(b"\x1b[?1049l")
    terminal.said = terminal.said.partition(b"\x1b[?1049l")[2]
    terminal.until(b"run-end")
    assert terminal.process.wait(patience.PROCESS) == 0


def test_status_shows_no_escapes_on_a_terminal_or_off_it(tmp_path, capsys):
    state = snapshot(tmp_path).state
    assert not {c for c in status.render(state) if visible(c) != c}
    status.draw(state)
    said = capsys.readouterr().out
    assert not {c for c in said if visible(c) != c}
    assert "12" in said
    assert (
        logs.render(Line("2026-11-24 12:00:00.000", LogFile("train", 0, None, tmp_path), ESCAPE)).count("\\u001b") == 2
    )
