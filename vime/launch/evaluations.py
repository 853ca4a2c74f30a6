"""Jobs that evaluate what training exports (`--eval-job`), submitted by the controller: it alone speaks to Slurm.

Each is submitted by a `vime.eval` of its own, one at a time, so that a slow scheduler delays nobody. With
`--cluster local` that process is the evaluation itself. Nothing here ends a run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from vime.launch.steps import Step
from vime.run.folder import log_folder
from vime.run.messages import Report
from vime.run.plan import Plan
from vime.system import processes
from vime.system.private import private_folder

COMMAND = (sys.executable, "-u", "-m", "vime.eval")
SUBMIT_S = 180.0
"""Longest time of a submission; an evaluation on this machine has its job's time limit."""
GRACE_S = 20.0
"""Time for an evaluation on this machine to end its stages."""
FOLDER = "evaluations"
"""Name of the log folder."""


class Evaluations:
    """Evaluations of one start of a run. `event` writes to the journal."""

    def __init__(self, plan: Plan, *, event: Callable[..., object]) -> None:
        self._plan, self._event = plan, event
        self._waiting: deque[Report] = deque()
        self._step: Step | None = None
        self._taken = 0
        """Reports of `_step` that were looked at."""
        self._process: subprocess.Popen[bytes] | None = None
        self._rollout, self._log, self._deadline = 0, Path(), 0.0

    @property
    def settled(self) -> bool:
        """True if nothing is being submitted, or waits for it."""
        return self._process is None and not self._waiting

    def look(self, step: Step) -> None:
        """Take what a step asked for since the last call, and go on with what is under way. Returns at once."""
        if step is not self._step:
            self._step, self._taken = step, 0
        new, self._taken = step.reports[self._taken :], len(step.reports)
        for report in new:
            if report.kind == "evaluate":
                if why := report.data.get("left_out"):
                    self._left_out(int(report.data["rollout_id"]), str(why))
                else:
                    self._waiting.append(report)
        if self._process is not None:
            self._look_at_process()
        if self._process is None and self._waiting:
            self._start(self._waiting.popleft())

    def stop(self) -> None:
        """End what is under way: nobody would look at it any more."""
        self._waiting.clear()
        if self._process is not None:
            self._end_process()
            self._left_out(self._rollout, "the run ended first")

    def _start(self, report: Report) -> None:
        self._rollout = int(report.data["rollout_id"])
        self._log = private_folder(log_folder(self._plan.run_dir, FOLDER)) / f"{self._rollout:07d}.log"
        words = [*COMMAND, self._plan.run_dir, "--checkpoint", str(self._rollout)]
        words += ["--weights", str(report.data["weights"])]
        limit = self._plan.cluster.time_limit_minutes * 60 if self._plan.cluster.one_machine else SUBMIT_S
        self._deadline = time.monotonic() + limit
        file = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        except OSError as error:
            self._left_out(self._rollout, str(error))
        finally:
            os.close(file)

    def _look_at_process(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code is None and time.monotonic() > self._deadline:
            self._end_process()
            self._left_out(self._rollout, f"no end in time; look at {self._log}")
        elif code is not None:
            self._process = None
            last = self._last_line()
            if code:
                self._left_out(self._rollout, f"{last or f'exit code {code}'} ({self._log})")
            else:
                self._event("evaluation", f"rollout {self._rollout}: {last}", data={"rollout_id": self._rollout})

    def _end_process(self) -> None:
        """TERM for a controller on this machine, which ends its stages; then KILL for the whole tree."""
        process, self._process = self._process, None
        assert process is not None
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            processes.kill_tree(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        # A process that ends on TERM without its children leaves them in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def _last_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _left_out(self, rollout_id: int, why: str) -> None:
        data = {"rollout_id": rollout_id, "left_out": True}
        self._event("evaluation", f"rollout {rollout_id} is left out: {why}", data=data)
