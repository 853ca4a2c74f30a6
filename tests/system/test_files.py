"""Files that appear whole: an interruption or a neighbour changes nothing of what stands at a path."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from vime.system import files
from vime.system.files import PRIVATE, READABLE, draft, read_json, remove_drafts, replace_link, write_file, write_json


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_file_is_replaced_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": "größe"}, mode=READABLE)
    write_json(path, {"a": 2}, mode=PRIVATE)
    assert json.loads(path.read_text()) == {"a": 2}
    assert mode_of(path) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_writer_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_file(path, "old", mode=PRIVATE)

    def interrupted() -> None:
        with draft(path, mode=PRIVATE) as file:
            os.write(file, b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_a_planted_link_at_the_drafts_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names cannot be foreseen; here they are, and still the victim's file stays as it is."""
    victim, path = tmp_path / "victim", tmp_path / "trace.json"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0")
    for target in (victim, tmp_path / "nothing"):
        planted = tmp_path / ".trace.json.0.draft"
        planted.symlink_to(target)
        with pytest.raises(FileExistsError):
            write_file(path, "ours", mode=PRIVATE)
        planted.unlink()
    assert victim.read_text() == "precious"
    assert not path.exists()
    assert not (tmp_path / "nothing").exists()


def test_two_writers_have_two_drafts_and_the_last_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with draft(path, mode=PRIVATE) as one, draft(path, mode=PRIVATE) as two:
        os.write(one, b"one")
        os.write(two, b"two")
    assert path.read_text() == "one"


def test_a_link_at_the_path_itself_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "report.html"
    victim.write_text("precious")
    path.symlink_to(victim)
    write_file(path, "ours", mode=PRIVATE)
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


def test_drafts_of_killed_writers_of_one_file_go(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789abcdef.draft").touch()
    (tmp_path / ".b.0123456789abcdef.draft").touch()
    remove_drafts(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == [".b.0123456789abcdef.draft"]


def test_text_that_is_no_utf_8_is_written_as_an_escape(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    write_json(path, {"text": "\ud800"}, mode=PRIVATE)
    assert read_json(path) == {"text": "\ud800"}


def test_a_link_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "current.log"
    for name in ("one", "two"):
        replace_link(link, name)
        assert os.readlink(link) == name
    assert [entry.name for entry in tmp_path.iterdir()] == ["current.log"]


@pytest.mark.parametrize("content", [None, "", '{"a": ', "\x00"])
def test_json_that_is_missing_or_damaged_reads_as_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "notes.json"
    if content is not None:
        path.write_text(content)
    assert read_json(path) is None
