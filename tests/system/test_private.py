"""Folders and files of a run: the user's own, private whatever the umask, refused where others had a hand in them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from vime.errors import BadInput
from vime.system import private
from vime.system.private import private_folder, read_own, require_own_folder, shared_parents


@pytest.fixture(params=[0o022, 0o002, 0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every file of this process's user one of somebody else's."""
    monkeypatch.setattr(private.os, "geteuid", lambda: os.getuid() + 1)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_and_its_missing_parents_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    made = private_folder(tmp_path / "run" / "logs" / "train")
    assert [mode_of(path) for path in (made, made.parent, made.parent.parent)] == [0o700] * 3


def test_parents_are_for_all_whom_the_umask_admits_but_nobody_replaces_anothers(tmp_path: Path, umask: int) -> None:
    shared_parents(tmp_path / "base" / "runs" / "r1")
    assert mode_of(tmp_path / "base" / "runs") == 0o1777 & ~umask
    assert not (tmp_path / "base" / "runs" / "r1").exists()


def test_a_folder_of_ones_own_is_made_private_and_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run" / "plan.json").touch()
    private_folder(tmp_path / "run")
    assert mode_of(tmp_path / "run") == 0o700
    assert (tmp_path / "run" / "plan.json").exists()


def test_a_folder_that_others_may_have_filled_is_refused_and_an_empty_one_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o775)
    private_folder(folder)
    assert mode_of(folder) == 0o700
    folder.chmod(0o770)
    (folder / "planted").touch()
    with pytest.raises(BadInput, match=r"can be written by other users \(mode 770\).*chmod go-w"):
        private_folder(folder)
    with pytest.raises(BadInput, match="can be written by other users"):
        require_own_folder(folder)


def test_a_folder_a_link_and_a_file_of_somebody_else_are_refused(tmp_path: Path, stranger: None) -> None:
    folder, link, file = tmp_path / "run", tmp_path / "link", tmp_path / "plan.json"
    folder.mkdir(mode=0o700)
    link.symlink_to(folder)
    file.touch(mode=0o600)
    for call in (lambda: private_folder(folder), lambda: require_own_folder(folder), lambda: read_own(file)):
        with pytest.raises(BadInput, match="belongs to another user"):
            call()
    with pytest.raises(BadInput, match="is a link of another user"):
        private_folder(link)


def test_a_dangling_link_of_somebody_else_makes_nothing(tmp_path: Path, stranger: None) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="is a link of another user"):
        private_folder(tmp_path / "run")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_others_can_write_or_that_is_a_link_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("{}")
    file.chmod(0o644)
    assert read_own(file) == b"{}"
    (tmp_path / "link").symlink_to(file)
    with pytest.raises(OSError, match="symbolic link"):
        read_own(tmp_path / "link")
    file.chmod(0o664)
    with pytest.raises(BadInput, match=r"can be written by other users \(mode 664\)"):
        read_own(file)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(BadInput, match="is not a folder"):
        private_folder(tmp_path / "run")
