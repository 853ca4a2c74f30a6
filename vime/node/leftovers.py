"""Leftovers of a dead job on this node: processes that outlived their supervisor, and shared memory.

Called by whoever holds the lock of the job's node-local folder alone (vime.node.scratch): then no task of the job
lives here. Only what belongs to this user is looked at.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time

from vime.system import shared_memory
from vime.system.processes import environment_of, own_processes

OWNER = "VIME_STAGE_OF_JOB"
"""Environment variable of everything that a stage's command starts; supervisors and launchers do not have it."""
_END_S = 5.0


def remove(job: str, since_ns: int) -> None:
    """Ends the processes of a dead job, then removes segments made after `since_ns` (Unix time) that nobody uses."""
    kill_processes(job)
    shared_memory.remove_unused(since_ns)


def kill_processes(job: str) -> int:
    """SIGKILL to every process of this user that a stage of the job started; how many there were.

    Waits for their ends, at most `_END_S` seconds: one that is ending has no environment any more, but open files.
    """
    mark, deadline, killed = f"{OWNER}={job}".encode(), time.monotonic() + _END_S, set()
    while time.monotonic() < deadline:
        found = [pid for pid in own_processes() if mark in environment_of(pid)]
        if not found:
            break
        ending: list[int] = []
        for pid in found:
            # The descriptor holds the process that is looked at, whoever gets its number later.
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                ending.append(descriptor)
                if mark in environment_of(pid):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                    killed.add(pid)
        for descriptor in ending:
            end = select.poll()
            end.register(descriptor, select.POLLIN)
            end.poll(1000 * max(0.0, deadline - time.monotonic()))
            os.close(descriptor)
    return len(killed)
