"""A run folder has one owner: a second start is refused, and one that lost the folder has no say any more."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import patience
from vime.errors import BadInput
from vime.run.owner import OWNER, Owner, Superseded, lives, owned, read_owner, require_owner, this_start
from vime.system.files import write_json

ME = Owner("12", 1, "gpu006", "boot-1", os.getpid(), 1)


def never(job: str, restart: int) -> bool | None:
    raise AssertionError("asked of the scheduler")


@pytest.mark.parametrize(
    ("other", "says", "alive"),
    [
        # The scheduler gave the job another start: the one before has ended, or is cut off.
        (replace(ME, restart=0, host="gpu007"), True, False),
        # Another machine: the scheduler knows.
        (replace(ME, job="11", host="gpu007"), True, True),
        (replace(ME, job="11", host="gpu007"), False, False),
        (replace(ME, job="local-5", host="gpu007"), None, None),
        # This machine: the process itself.
        (replace(ME, job="11", boot="boot-0"), True, False),
        (replace(ME, job="11", pid=2**22, pid_start=5), True, False),
    ],
)
def test_whether_the_recorded_start_still_runs(other: Owner, says: bool | None, alive: bool | None) -> None:
    assert lives(other, ME, lambda job, restart: says) is alive


def test_a_process_that_has_anothers_number_is_not_the_owner() -> None:
    me = this_start("12", 1)
    assert lives(replace(me, job="11"), me, never) is True
    assert lives(replace(me, job="11", pid_start=me.pid_start - 1), me, never) is False


def test_a_second_start_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    with owned(tmp_path, this_start("local-1", 0), never):
        before = sorted(path.name for path in tmp_path.iterdir())
        with (
            pytest.raises(BadInput, match=r"in use by start 0 of job local-1 .*wait for its end"),
            owned(tmp_path, this_start("local-2", 0), never),
        ):
            raise AssertionError("inside")
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert read_owner(tmp_path) is None


def test_what_a_killed_owner_left_is_taken_over(tmp_path: Path) -> None:
    code = f"from vime.run.owner import *; import os\nwith owned({str(tmp_path)!r}, this_start('local-1', 0), None):"
    code += " os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], timeout=patience.PROCESS).returncode == 9
    assert read_owner(tmp_path) is not None
    with owned(tmp_path, this_start("local-2", 0), never):
        pass


def test_an_owner_of_whom_nobody_knows_is_named_with_its_file(tmp_path: Path) -> None:
    write_json(tmp_path / OWNER, {**vars(ME), "job": "local-5", "host": "elsewhere"}, mode=0o600)
    with (
        pytest.raises(BadInput, match=r"make sure that it has ended, then remove .*owner\.json"),
        owned(tmp_path, this_start("local-6", 0), lambda job, restart: None),
    ):
        raise AssertionError("inside")


def test_a_start_that_lost_the_folder_has_no_say(tmp_path: Path) -> None:
    require_owner(tmp_path, "12", 0)
    with owned(tmp_path, this_start("12", 1), never):
        require_owner(tmp_path, "12", 1)
        with pytest.raises(Superseded, match="start 0 of job 12 was superseded"):
            require_owner(tmp_path, "12", 0)
    write_json(tmp_path / OWNER, ["torn"], mode=0o600)
    require_owner(tmp_path, "12", 0)
