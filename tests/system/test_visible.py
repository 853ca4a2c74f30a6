"""Files of other machines, which a network file system shows late."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests.support import patience
from vime.system import visible


def test_file_systems_are_known_by_type(tmp_path: Path) -> None:
    assert visible.file_system("/proc/self") == "proc"
    assert visible.file_system(tmp_path / "not" / "there") == visible.file_system(tmp_path) != ""


@pytest.mark.parametrize(("kind", "seconds"), [("ext4", 0), ("tmpfs", 0), ("nfs4", 65), ("lustre", 65), ("", 65)])
def test_a_file_system_that_is_not_known_to_be_local_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, kind: str, seconds: float
) -> None:
    monkeypatch.setattr(visible, "file_system", lambda path: kind)
    assert visible.patience_s("/anywhere") == seconds


def test_a_file_that_shows_up_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "late"
    threading.Timer(0.3, path.touch).start()
    assert visible.appears(path, patience.MOMENT)
    begin = time.monotonic()
    assert not visible.appears(tmp_path / "never", 0.2)
    assert time.monotonic() - begin < patience.MOMENT


def test_a_folder_that_is_missing_has_no_names(tmp_path: Path) -> None:
    assert visible.names_in(tmp_path / "missing") == set()
