"""Progress of a thread, readable by others: its phase, and how often it has come further."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

_ROOT = str(Path(__file__).parents[1])
_WAITS = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
"""Parts of paths of code that waits for other ranks."""


class Progress:
    """Phases and marks of the thread that makes them; any other thread may read."""

    def __init__(self) -> None:
        self._phases: list[str] = []
        self._thread = 0
        self._marked = time.monotonic()
        self.marks = 0
        """Steps so far; a phase that begins or ends is one."""

    @property
    def phase(self) -> str:
        """Open phases from the outermost in, as in `train/log_probs`; empty between calls."""
        return "/".join(self._phases)

    @property
    def still_s(self) -> float:
        """Seconds since the last mark."""
        return time.monotonic() - self._marked

    def mark(self) -> None:
        """Say that the thread has come further."""
        self.marks += 1
        self._marked = time.monotonic()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The block is a phase, also if it fails."""
        self._thread = threading.get_ident()
        self._phases.append(phase)
        self.mark()
        try:
            yield
        finally:
            self._phases.pop()
            self.mark()

    def place(self) -> tuple[str, bool]:
        """Where the thread stands in the code, and whether it waits there for other ranks."""
        frame = sys._current_frames().get(self._thread)
        inner, own, waits = frame, None, False
        while frame is not None and own is None:
            path = frame.f_code.co_filename
            waits = waits or any(part in path for part in _WAITS)
            own = frame if path.startswith(_ROOT) else None
            frame = frame.f_back
        if inner is None:
            return "", False
        return _line(inner) if own in (None, inner) else f"{_line(inner)} in {_line(own)}", waits


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
