"""Somebody at a shell of the login node, with a folder of models and data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import patience
from vime.run.jobs import read_jobs

ROOT = Path(__file__).parents[2]


class Person:
    """Types commands in the checkout; `base` is `$BASE_DIR`, and holds the list of runs too."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.env = {**os.environ, "BASE_DIR": str(base), "XDG_STATE_HOME": str(base / "state")}

    def types(self, *words: str, seconds: float = patience.PROCESS) -> str:
        """Output of `python WORDS`, which has to end well in this time."""
        argv = [sys.executable, *words]
        done = subprocess.run(argv, env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
        return done.stdout

    def submits(self, recipe: str, nodes: int, run: str, *flags: str) -> str:
        """Submits a recipe's run, made short, to Slurm; the job's id."""
        flags = ("--eval-interval", "1000", "--rollout-timeout", str(patience.GROUP), *flags)
        options = ("--recipe", recipe, "--nodes", str(nodes), "--run-name", run)
        self.types("-m", "vime.submit", *options, "--", *flags)
        (job,) = read_jobs(self.base / "runs" / run)
        return job.job_id
