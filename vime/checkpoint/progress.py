"""Progress of work measured in bytes: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

LINE_SECONDS = 5.0
BAR_SECONDS = 0.1
_BAR = 24


class Progress:
    """Counts bytes from several threads and reports progress, rate and remaining time."""

    def __init__(self, what: str, total: int, stream: TextIO | None = None) -> None:
        self.what, self.total, self.done = what, total, 0
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._started = self._said = time.monotonic()

    def add(self, count: int) -> None:
        """Count bytes as done; reports if a report is due."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._said >= (BAR_SECONDS if self._terminal else LINE_SECONDS):
                self._said = now
                self._say(now)

    def close(self) -> None:
        """Report the totals: all bytes, seconds and mean rate."""
        with self._lock:
            self._say(time.monotonic())
            if self._terminal:
                self._stream.write("\n")

    def _say(self, now: float) -> None:
        seconds = max(now - self._started, 1e-9)
        rate = self.done / seconds
        share = self.done / self.total if self.total else 1.0
        left = f"{(self.total - self.done) / rate:.0f} s left" if 0 < self.done < self.total else f"{seconds:.1f} s"
        size = f"{self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB"
        text = f"{self.what} {share:4.0%} {size}, {rate / 1e9:.2f} GB/s, {left}"
        if self._terminal:
            filled = round(share * _BAR)
            self._stream.write(f"\r[{'#' * filled}{'.' * (_BAR - filled)}] {text}\x1b[K")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()
