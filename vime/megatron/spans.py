"""Where a rank's time goes: seconds by name for metrics, spans for the timeline, and waits for the other ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from vime.megatron import backend
from vime.system.clock import Stopwatch
from vime.system.progress import Progress

WAIT = "wait"


class SpanRecorder:
    """Records named spans of one rank, in Unix seconds, until they are taken."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Progress()
        self._spans: list[tuple[str, float, float]] = []

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The time of the block; it is recorded when the block ends well."""
        watch = Stopwatch()
        with self.progress.during(name):
            yield
        self._spans.append((name, watch.start, watch.end))

    def after_all_ranks(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called when every rank has come as far: what a rank waits before it is a span of its own.

        Put before the first collective of a step, it tells the slow rank from those that wait for it.
        """

        def waiting(*args: Any, **kwargs: Any) -> Any:
            if not backend.setup().cpu:
                # Kernels under way are this rank's own work, not its wait.
                torch.cuda.synchronize()
            with self.span(WAIT):
                dist.barrier()
            return function(*args, **kwargs)

        return waiting

    def seconds(self) -> dict[str, float]:
        """Seconds by name of the spans that were not taken yet."""
        found: dict[str, float] = {}
        for name, start, end in self._spans:
            found[name] = found.get(name, 0.0) + end - start
        return found

    def take_spans(self) -> list[tuple[str, float, float]]:
        """The spans since the last call: (name, start, end)."""
        spans, self._spans = self._spans, []
        return spans
