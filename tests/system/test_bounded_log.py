"""A log keeps its newest lines and a bounded size, whoever writes it."""

from __future__ import annotations

import os
from pathlib import Path

from vime.run.logs import Follower, LogFile
from vime.system.bounded_log import BoundedLog, cut_back, earlier

LINE = b"x" * 99 + b"\n"


def test_a_log_begins_anew_and_the_lines_before_stay_in_one_more_file(tmp_path: Path) -> None:
    path = tmp_path / "node00.log"
    log = BoundedLog(path, most=1000)
    for number in range(95):
        log.write(b"%03d" % number + LINE)
        assert path.stat().st_size <= 1000 + 103
    log.close()
    kept = earlier(path).read_bytes() + path.read_bytes()
    assert sorted(tmp_path.iterdir()) == [path, earlier(path)]
    numbers = [int(line[:3]) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 95))
    assert len(numbers) >= 10
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}


def test_one_that_was_there_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(LINE * 10)
    log = BoundedLog(path, most=1000)
    log.write(LINE)
    log.write(LINE)
    assert (earlier(path).stat().st_size, path.stat().st_size) == (1100, 100)


def test_one_that_another_process_appends_to_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "engine-0-node00.log"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(writer, LINE * 5)
    cut_back(path, most=1000)
    assert not earlier(path).exists()
    os.write(writer, LINE * 6)
    cut_back(path, most=1000)
    os.write(writer, b"next\n")
    os.close(writer)
    assert earlier(path).read_bytes() == LINE * 11
    assert path.read_bytes() == b"next\n"


def test_a_log_that_is_gone_or_cannot_be_copied_is_left(tmp_path: Path) -> None:
    cut_back(tmp_path / "absent.log", most=1)
    path = tmp_path / "a.log"
    path.write_bytes(LINE)
    earlier(path).mkdir()
    cut_back(path, most=1)
    assert path.read_bytes() == LINE


def test_who_follows_it_reads_on(tmp_path: Path) -> None:
    path = tmp_path / "node00.log"
    log = BoundedLog(path, most=250)
    follower = Follower(LogFile("train", 0, None, path))
    seen = []
    for number in range(9):
        log.write(b"2026-01-31 12:00:00.000 line %d " % number + LINE)
        seen += [line.text.split()[1] for line in follower.poll()]
    assert seen == [str(number) for number in range(9)]
