"""Runs a plan on this machine: the controller in this process, the stages as its children."""

from __future__ import annotations

import re
from pathlib import Path

from vime.launch.controller import Controller, tell
from vime.launch.runner_local import LocalRunner
from vime.launch.witness import witnessed
from vime.run.logs import Follower, find_logs
from vime.run.plan import Plan

# Lines of training that a person at the terminal wants to see; everything is in the log.
_TOLD = re.compile(r"^(rollout|eval|weights from|checkpoint|error:)")


def run(plan: Plan) -> int:
    """The run's exit code. Prints every event, and training's own summary lines."""
    progress = _Progress(plan.run_dir)
    with witnessed(plan.run_dir):
        cause = Controller(plan, LocalRunner(plan), say=tell, watching=progress.tell).run()
    progress.tell()
    if cause:
        print(f"logs are in {Path(plan.run_dir) / 'logs'}", flush=True)
    return int(cause)


class _Progress:
    """Tells what training's first task says; what was in its log before this start is left out."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._follower: Follower | None = None
        old = find_logs(run_dir, stage="train", node=0)
        if old:
            self._follower = Follower(old[0], offset=old[0].path.stat().st_size)

    def tell(self) -> None:
        if self._follower is None:
            if not (logs := find_logs(self._run_dir, stage="train", node=0)):
                return
            self._follower = Follower(logs[0])
        for line in self._follower.poll():
            if _TOLD.match(line.text):
                tell(f"{line.stamp[11:19]} {line.text}")
