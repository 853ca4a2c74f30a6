"""Timeline of a run: spans in `timeline.jsonl`, exported to Chrome's trace format for Perfetto."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vime.system.clock import Stopwatch
from vime.system.json_lines import LineFile, Lines

TIMELINE_FILE = "timeline.jsonl"
WAIT = "wait"
"""Name of a rank's spans at the barrier before gradients are reduced; nested in the rank's `train`."""


@dataclass(frozen=True)
class Span:
    """One phase of one rollout on one track (`driver`, `rank 3`, `engine 0`); times in Unix seconds."""

    name: str
    rollout_id: int
    track: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Timeline:
    """Appends spans; keeps the current rollout's so that their durations can be logged."""

    def __init__(self, run_dir: str | Path, track: str = "driver") -> None:
        self._file = LineFile(Path(run_dir) / TIMELINE_FILE)
        self._failed = False
        self._track = track
        self._recent: list[Span] = []

    @contextmanager
    def phase(self, name: str, rollout_id: int) -> Iterator[None]:
        """Record a span around the block, also if the block fails."""
        watch = Stopwatch()
        try:
            yield
        finally:
            self.add(Span(name, rollout_id, self._track, watch.start, watch.end))

    def add(self, span: Span) -> None:
        self._recent.append(span)
        self._write(asdict(span))

    def add_ranks(self, rollout_id: int, ranks: Sequence[Sequence[tuple[str, float, float]]]) -> None:
        """Spans (name, start, end) of every trainer rank, in rank order, as one line, since a long run has millions."""
        shown = [[[name, round(start, 3), round(end, 3)] for name, start, end in spans] for spans in ranks]
        self._write({"rollout_id": rollout_id, "ranks": shown})

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.add(line)
        except OSError as error:
            # A run does not end for want of its timeline.
            if not self._failed:
                print(f"warning: {TIMELINE_FILE} takes no spans ({error.strerror}): they are lost", flush=True)
            self._failed = True

    def take_metrics(self) -> dict[str, float]:
        """`perf/<phase>_time` in seconds of this track's spans since the last call."""
        metrics: dict[str, float] = {}
        for span in self._recent:
            if span.track == self._track:
                key = f"perf/{span.name}_time"
                metrics[key] = metrics.get(key, 0.0) + span.seconds
        self._recent.clear()
        return metrics

    def close(self) -> None:
        self._file.close()


def read_timeline(
    run_dir: str | Path, *, rank_rollouts: int | None = None, damage: Counter[str] | None = None
) -> list[Span]:
    """All spans of a run in the order they ended; of ranks, only the newest `rank_rollouts` (None: all).

    Lines that hold no spans are left out, and counted in `damage` under the file's name.
    """
    path = Path(run_dir) / TIMELINE_FILE
    first = -1
    if rank_rollouts is not None:
        # Once for the newest rollout, so that the spans of all ranks of a long run are never held at once.
        newest = max(Lines(path).read(lambda line: int(line["rollout_id"])), default=0)
        first = newest - rank_rollouts + 1
    lines = Lines(path)
    spans = [span for found in lines.read(lambda line: _spans(line, first)) for span in found]
    if damage is not None:
        damage[TIMELINE_FILE] += lines.skipped
    return spans


def _spans(line: dict[str, Any], first: int) -> list[Span]:
    """Spans of a line; of ranks, from rollout `first` on. Raises ValueError, KeyError or TypeError."""
    rollout_id = int(line["rollout_id"])
    if "ranks" not in line:
        return [Span(str(line["name"]), rollout_id, str(line["track"]), float(line["start"]), float(line["end"]))]
    if rollout_id < first:
        return []
    return [
        Span(str(name), rollout_id, f"rank {rank}", float(start), float(end))
        for rank, found in enumerate(line["ranks"])
        for name, start, end in found
    ]


def waits(spans: Sequence[Span]) -> dict[str, float]:
    """Share of training time that each rank waited for the others, by track, in rank order."""
    busy: dict[str, float] = {}
    waited: dict[str, float] = {}
    for span in spans:
        if span.track.startswith("rank "):
            busy[span.track] = busy.get(span.track, 0.0) + (span.seconds if span.name == "train" else 0.0)
            waited[span.track] = waited.get(span.track, 0.0) + (span.seconds if span.name == WAIT else 0.0)
    tracks = sorted(busy, key=lambda track: int(track.split()[1]))
    return {track: waited[track] / busy[track] for track in tracks if busy[track] > 0}


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """Trace Event Format ("X" events, microseconds), one thread per track; opens in Perfetto and chrome://tracing.

    Nested spans of a track (a wait inside a training step) are shown below their parent.
    """
    tracks = {name: number for number, name in enumerate(dict.fromkeys(span.track for span in spans))}
    origin = min((span.start for span in spans), default=0.0)
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}
        for track, number in tracks.items()
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "pid": 0,
            "tid": tracks[span.track],
            "ts": round((span.start - origin) * 1e6),
            "dur": round(span.seconds * 1e6),
            "args": {"rollout": span.rollout_id},
        }
        for span in spans
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}
