"""Nodes that a run keeps after its end (`--hold`): further runs start in them at once, one after the other.

Each is a controller of its own, in a process of its own with the code of its own run; it makes its own preflight,
Ray and binding. It cannot requeue the job, which is the holding run's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from vime.errors import BadInput, Cause
from vime.launch.signals import Signals
from vime.run.folder import read_plan
from vime.run.hold import Holding, forget_requests, take_request, write_holding
from vime.run.journal import Journal, last_start, read_events
from vime.run.plan import Plan
from vime.run.variables import HELD

POLL_S = 0.5
LOOK_AGAIN_S = 60.0
"""Interval between two questions to Slurm about the allocation's end."""
COMMAND = ("-u", "-m", "vime.launch.held", "--run-dir")


def keeps(plan: Plan, cause: Cause) -> bool:
    """True if the nodes stay after a run that ended so: not after a cancel, nor if the run itself starts again."""
    if not plan.hold_minutes or cause is Cause.CANCELLED:
        return False
    ends = [event for event in last_start(read_events(plan.run_dir)) if event.kind == "run-end"]
    return not (ends and ends[-1].data.get("requeued"))


class Hold:
    """The time after a run in which its nodes wait. Idle time is counted, and ends the hold."""

    def __init__(self, plan: Plan, *, end_time: Callable[[], float | None], say: Callable[[str], None]) -> None:
        """`end_time`: Unix time at which the allocation ends; None: never, or unknown."""
        self._plan, self._end_time, self._say = plan, end_time, say
        self._idle_s, self._runs, self._over = 0.0, 0, False
        self._looked, self._end = float("-inf"), float("inf")

    def keep(self) -> None:
        """Run what is asked for, until the nodes were idle for `--hold`, or a signal arrives. In the main thread."""
        run, limit = self._plan.run_dir, self._plan.hold_minutes * 60.0
        journal = Journal(run)
        try:
            with Signals() as signals:
                # The file first: whoever reads of the hold can use it.
                self._show(limit)
                self._event(journal, f"{len(self._plan.nodes)} nodes are kept for {self._plan.hold_minutes} min", {})
                while not self._over and self._idle_s < limit and signals.take() is None:
                    self._wait(limit - self._idle_s, signals)
                    if (folder := self._next()) is not None:
                        self._run(folder, journal, signals)
        finally:
            write_holding(run, None)
            for folder in forget_requests(run):
                self._say(f"error: {folder} was not started: the hold has ended")
            data = {"idle_s": round(self._idle_s, 1), "runs": self._runs}
            self._event(journal, f"the hold ends after {self._idle_s:.0f} s idle and {self._runs} runs", data)
            journal.close()

    def _wait(self, seconds: float, signals: Signals) -> None:
        """One look-around of the idle nodes."""
        began = time.monotonic()
        if began - self._looked > LOOK_AGAIN_S:
            self._show(seconds)
        signals.wait([], POLL_S)
        self._idle_s += time.monotonic() - began

    def _show(self, seconds: float) -> None:
        """Say until when the nodes wait: for these seconds, or to the job's end."""
        self._looked, self._end = time.monotonic(), self._end_time() or float("inf")
        write_holding(self._plan.run_dir, Holding(len(self._plan.nodes), min(time.time() + seconds, self._end)))

    def _next(self) -> str | None:
        try:
            folder = take_request(self._plan.run_dir)
            if folder is not None and len(read_plan(folder).nodes) > len(self._plan.nodes):
                raise BadInput(f"{folder} takes more nodes than the {len(self._plan.nodes)} that are held")
            return folder
        except BadInput as error:
            self._say(f"error: {error}")
            return None

    def _run(self, folder: str, journal: Journal, signals: Signals) -> None:
        write_holding(self._plan.run_dir, None)
        self._looked = float("-inf")
        self._runs += 1
        self._event(journal, f"{Path(folder).name} starts in these nodes", {"run_dir": folder})
        process = subprocess.Popen([sys.executable, *COMMAND, folder], env={**os.environ, HELD: "1"})
        while (code := process.poll()) is None:
            if (number := signals.take()) is not None:
                # Its controller ends its stages, or saves a checkpoint; then the hold ends too.
                process.send_signal(number)
                self._over = True
            signals.wait([], POLL_S)
        self._event(journal, f"{Path(folder).name} ended: {_words(code)}", {"run_dir": folder, "code": code})

    def _event(self, journal: Journal, text: str, data: dict[str, object]) -> None:
        journal.write("hold", text, data=data)
        self._say(f"{time.strftime('%H:%M:%S')} hold         {text}")


def _words(code: int) -> str:
    known = {cause.value: cause.name.lower().replace("_", " ") for cause in Cause}
    return known.get(code, f"exit code {code}")
