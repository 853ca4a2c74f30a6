"""The witness: a small process that records the run's end if the controller is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

from vime.errors import Cause
from vime.run.history import ENDS
from vime.run.journal import Event, Journal, last_start, read_events

_DEAF_TO = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def witnessed(run_dir: str) -> Iterator[None]:
    """Watch this process inside the block. Enter before any thread or child starts.

    Slurm may kill the witness together with the controller; then the run's next start records the end.
    """
    watched, life = os.pipe2(os.O_CLOEXEC)
    controller = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            # Slurm's warnings are meant for the controller.
            for number in _DEAF_TO:
                signal.signal(number, signal.SIG_IGN)
            os.close(life)
            os.read(watched, 1)
            tell_of_death(run_dir, controller)
        finally:
            os._exit(0)
    os.close(watched)
    try:
        yield
    finally:
        os.close(life)
        os.waitpid(pid, 0)


def tell_of_death(run_dir: str, controller: int) -> None:
    """Write the final event for a controller that ended without one."""
    events = last_start(read_events(run_dir))
    if not events or events[0].data.get("pid") != controller or events[-1].kind in ENDS:
        return
    stage = running_stage(events)
    text = "the controller was killed" + (f" while {stage} ran" if stage else "") + ": by hand, or for want of memory"
    data = {"cause": Cause.CODE_ERROR.name, "log_tail": "", "requeued": False}
    journal = Journal(run_dir)
    journal.write("run-end", text, stage=stage, node=socket.gethostname(), data=data)
    journal.close()


def running_stage(events: list[Event]) -> str | None:
    """Stage still running after a start's events; a service only if no other stage runs."""
    running: list[str] = []
    for event in events:
        if event.kind == "stage-start" and event.stage:
            running.append(event.stage)
        elif event.kind == "stage-end" and event.stage in running:
            running.remove(event.stage)
    return running[-1] if running else None
