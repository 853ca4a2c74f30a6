"""A file's lock is one holder's at a time, and its file is private."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from vime.system.locks import locked


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, wait=True) as first, locked(path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(path, wait=False) as third:
        assert third
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_system_without_locks_does_without_and_other_errors_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(number: int) -> None:
        def flock(file: int, how: int) -> None:
            raise OSError(number, "of the file system")

        monkeypatch.setattr("vime.system.locks.fcntl.flock", flock)

    fails(errno.EOPNOTSUPP)
    with locked(tmp_path / "lock", wait=True) as held:
        assert held
    fails(errno.EIO)
    with pytest.raises(OSError, match="of the file system"), locked(tmp_path / "lock", wait=True):
        pass
