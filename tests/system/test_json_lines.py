"""Files of JSON lines after crashes, full disks and foreign writers: damage costs the damaged lines only."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.system import json_lines
from vime.system.json_lines import LineFile, Lines, damage_note, encode_line


def number(line: dict[str, Any]) -> int:
    return int(line["n"])


def read(path: Path) -> tuple[list[int], int]:
    lines = Lines(path)
    return list(lines.read(number)), lines.skipped


GOOD = b'{"n":1}\n'
DAMAGE = {
    "torn and continued": (b'{"n":5,"x{"n":6}\n', 1),
    "NUL bytes": (bytes(4096) + b"\n", 1),
    "NUL bytes before a line": (bytes(100) + b'{"n":7}\n', 0),
    "a list": (b"[1,2]\n", 1),
    "a number": (b"3\n", 1),
    "another object": (b'{"m":1}\n', 1),
    "a value of another type": (b'{"n":[]}\n', 1),
    "no JSON": (b"Traceback (most recent call last):\n", 1),
    "no UTF-8": (b'\xff\xfe{"n":1}\n', 1),
    "deep": (b"[" * 100_000 + b"\n", 1),
    "many digits": (b'{"n":' + b"9" * 5000 + b"}\n", 1),
    "infinite": (b'{"n":Infinity}\n', 1),
    "blank": (b"\n  \n", 0),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_in_the_middle_is_skipped_and_counted(tmp_path: Path, name: str) -> None:
    damage, skipped = DAMAGE[name]
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + damage + b'{"n":2}\n')
    found, counted = read(path)
    assert (found[0], found[-1], counted) == (1, 2, skipped)


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == ([], 0)


def test_an_end_that_its_writer_has_not_finished_is_left_to_it_and_closed_on_the_next_open(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b'{"n":2,"te')
    assert read(path) == ([1], 0)
    file = LineFile(path)
    file.add({"n": 3})
    file.close()
    assert read(path) == ([1, 3], 1)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(), max_size=3)), st.data())
def test_a_file_cut_anywhere_loses_at_most_one_line(values: list[dict[str, Any]], data: st.DataObject) -> None:
    import tempfile

    whole = b"".join(encode_line(value) for value in values)
    cut = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.jsonl")
        path.write_bytes(whole[:cut])
        file = LineFile(path)
        file.add({"last": True})
        file.close()
        found = list(Lines(path).read(dict))
    assert found[-1] == {"last": True}
    assert found[:-1] == values[: whole[:cut].count(b"\n")] or found[:-1] == values[: whole[:cut].count(b"\n") + 1]


def test_a_huge_line_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 2**16)
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(64 * 2**20)
        file.seek(64 * 2**20)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    try:
        assert read(path) == ([1, 1], 1)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic link"):
        LineFile(tmp_path / "x.jsonl")
    assert not (tmp_path / "elsewhere").exists()


def test_damage_is_told_in_a_few_words() -> None:
    assert damage_note({"events.jsonl": 0, "metrics.jsonl": 2}) == "lines that could not be read: 2 of metrics.jsonl"
    assert damage_note({}) == ""
    assert json.loads(encode_line({"a": "\ud800"})) == {"a": "\ud800"}
