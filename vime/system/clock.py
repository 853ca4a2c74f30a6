"""Wall-clock times of spans that a jump of the clock does not stretch."""

from __future__ import annotations

import time


class Stopwatch:
    """A span that begins now. Its length is measured by the clock that nobody sets."""

    def __init__(self) -> None:
        self.start = time.time()
        """Unix seconds."""
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def end(self) -> float:
        """Unix seconds of now, by the clock as it was at the start."""
        return self.start + self.seconds
