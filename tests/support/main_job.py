"""Shared parts of the main job's tests: one base folder, with a tiny checkpoint made once."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support import patience

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class BaseFolder:
    """`$BASE_DIR` of the tiny recipes."""

    path: Path

    def fill(self) -> None:
        """The checkpoint and the data that quickstart.sh makes; nothing where it has made them already."""
        argv = [sys.executable, "tools/make_tiny_checkpoint.py", "--output-dir", str(self.path), "--seed", "0"]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=patience.TRAINING)
        assert done.returncode == 0, done.stderr[-2000:]


class PeakMemory:
    """The most memory that the processes of a base folder held at one time, each page counted once."""

    def __init__(self, base: Path, every_s: float = 2.0) -> None:
        self.bytes = 0
        self._base, self._every_s = str(base), every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._every_s):
            self.bytes = max(self.bytes, sum(self._held(process) for process in psutil.process_iter()))

    def _held(self, process: psutil.Process) -> int:
        """A page shared by n processes counts 1/n in each. Some of Ray's processes leave the family of their parent:
        `$BASE_DIR` in the environment tells ours."""
        try:
            return process.memory_full_info().pss if process.environ().get("BASE_DIR") == self._base else 0
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return 0
