"""`python -m vime.cancel [RUN]`: end a run: its job, or its controller on this machine; by default the last run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vime.cli import command
from vime.errors import BadInput, DeadlineExceeded
from vime.run.folder import read_plan
from vime.run.jobs import read_jobs
from vime.run.journal import last_start, read_events
from vime.run.registry import find_run, last_run
from vime.run.scheduler import Scheduler, find_scheduler
from vime.run.state import controller_is_here, run_state
from vime.system.processes import start_ticks

_PATIENCE_S = 60.0


def cancel(run_dir: Path) -> str:
    """End the run and wait until it has ended; return one line that says what was done. Raises DeadlineExceeded."""
    state = run_state(run_dir)
    if state.state in ("succeeded", "failed", "cancelled", "planned"):
        return f"{state.run}: nothing to cancel, it is {state.state}"
    if jobs := read_jobs(run_dir):
        ended = cancel_jobs(find_scheduler(read_plan(run_dir).cluster.kind), [job.job_id for job in jobs])
        return f"{state.run}: " + (
            f"job {', '.join(ended)} cancelled" if ended else "nothing to cancel, no job is left"
        )
    pid = controller_is_here(last_start(read_events(run_dir)))
    if pid is None:
        raise BadInput(f"{state.run} has no controller on this machine: cancel it where it was started")
    ticks = start_ticks(pid)
    os.kill(pid, signal.SIGTERM)
    _wait(f"process {pid}", lambda: start_ticks(pid) != ticks)
    return f"{state.run}: cancelled"


def cancel_jobs(scheduler: Scheduler, jobs: Sequence[str]) -> list[str]:
    """End the jobs that have not ended, and wait until they have. Raises SchedulerError, DeadlineExceeded."""
    active = [job for job in jobs if not _is_over(scheduler, job)]
    # The last one of a chain first, so that none starts because the one before it ends.
    for job in reversed(active):
        scheduler.cancel(job)
    for job in active:
        _wait(f"job {job}", lambda job=job: _is_over(scheduler, job))
    return active


def _is_over(scheduler: Scheduler, job: str) -> bool:
    state = scheduler.job(job)
    return state is None or not state.active


def _wait(what: str, over) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not over():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{what} has not ended {_PATIENCE_S:.0f} s after it was cancelled")
        time.sleep(0.2)


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.cancel", description="End a run.")
    parser.add_argument("run", nargs="?", help="name or folder of the run; default: the last one")
    args = parser.parse_args(argv)
    print(cancel(find_run(args.run) if args.run else last_run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
