"""Processes of this machine as /proc tells of them."""

from __future__ import annotations

import os
import subprocess
import sys

from vime.system.processes import descendants, environment_of, find_process, group_runs, own_processes, start_ticks

SLEEP = [sys.executable, "-c", "import time; time.sleep(3600)"]


def test_a_live_process_is_found_with_parent_group_and_start() -> None:
    with subprocess.Popen(SLEEP, start_new_session=True, env={"VIME_MARK": "1"}) as child:
        found = find_process(child.pid)
        assert found is not None
        assert (found.parent, found.group) == (os.getpid(), child.pid)
        assert found.start == start_ticks(child.pid)
        assert child.pid in own_processes()
        assert child.pid in descendants(os.getpid())
        assert group_runs(child.pid)
        child.kill()


def test_a_process_that_ended_is_none_before_and_after_its_parent_collects_it() -> None:
    child = subprocess.Popen(SLEEP, start_new_session=True)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert find_process(child.pid) is None
    assert not group_runs(child.pid)
    child.wait()
    assert start_ticks(child.pid) is None
    assert environment_of(child.pid) == []
