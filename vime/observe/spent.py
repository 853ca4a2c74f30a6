"""Wall time of a run by cause: what went into generating and training, and what was lost. Pure functions of spans."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vime.observe.markup import details, escape, table
from vime.observe.timeline import Span
from vime.planning.show import duration

USEFUL = ("generating", "training", "evaluation")
LOST = ("longest answers", "hand-over", "weight sync", "saving", "recovery", "starting", "queue", "between phases")
ABOUT = {
    "generating": "engines generate, most of the rollout's groups still open",
    "training": "log-probs and optimizer steps",
    "evaluation": "held-out sets",
    "longest answers": "generation after nine tenths of the groups had passed, while engines run empty",
    "hand-over": "trainer and engines swap GPUs, and engines are compared with the trainer",
    "weight sync": "the trainer's weights go to the engines",
    "saving": "checkpoints, as far as training waits for them",
    "recovery": "engine restarts, starts after the first, and rollouts that were done again",
    "starting": "from the job's start to the first rollout",
    "queue": "between the end of one start and the next: the job waited",
    "between phases": "whatever no phase covers",
}
_PHASES = {"train": "training", "sync": "weight sync", "save": "saving", "eval": "evaluation", "generate": "generating"}
_ORDER = (
    "recovery",
    "training",
    "weight sync",
    "saving",
    "engine restart",
    "evaluation",
    "generating",
    "starting",
    "queue",
)
"""Where phases overlap, the first of these counts: generation that runs next to training costs nothing."""


@dataclass(frozen=True)
class Interval:
    """A stretch of wall time in Unix seconds, and what it went into."""

    start: float
    end: float
    label: str
    rollout_id: int = -1


def attribute(intervals: Sequence[Interval], order: Sequence[str]) -> list[tuple[Interval, float]]:
    """Seconds that each interval gets, where an instant belongs to the active interval that comes first in `order`.

    The seconds add up to the length of the union of all intervals.
    """
    rank = {label: number for number, label in enumerate(order)}
    todo = sorted((each for each in intervals if each.end > each.start), key=lambda each: each.start)
    edges = sorted({edge for each in todo for edge in (each.start, each.end)})
    seconds = [0.0] * len(todo)
    active: list[tuple[int, int]] = []
    coming = 0
    for here, there in itertools.pairwise(edges):
        while coming < len(todo) and todo[coming].start <= here:
            heapq.heappush(active, (rank[todo[coming].label], coming))
            coming += 1
        while active and todo[active[0][1]].end <= here:
            heapq.heappop(active)
        if active:
            seconds[active[0][1]] += there - here
    return list(zip(todo, seconds, strict=True))


def spent(
    spans: Sequence[Span],
    steps: Mapping[int, Mapping[str, float]],
    starts: Sequence[tuple[float, float | None]],
) -> dict[str, float]:
    """Seconds of wall time by cause, in the order of USEFUL and LOST; causes without time are left out.

    `starts`: (start, end) of every start of the run in Unix seconds, from the journal; an end may be unknown.
    The sum is the time from the first start to the last thing that happened.
    """
    driver = [span for span in spans if span.track == "driver"]
    if not driver:
        return {}
    began = sorted(start for start, _ in starts) or [min(span.start for span in driver)]
    whole = min(began[0], *(span.start for span in driver)), max(span.end for span in driver)
    whole = (whole[0], max(whole[1], *(end for _, end in starts if end is not None), began[-1]))
    found = attribute([*_phases(driver, began), *_starts(driver, starts)], _ORDER)
    totals: dict[str, float] = dict.fromkeys((*USEFUL, *LOST), 0.0)
    for interval, seconds in found:
        for label, part in _split(interval, seconds, steps):
            totals[label] += part
    rest = max(0.0, whole[1] - whole[0] - sum(seconds for _, seconds in found))
    outside = min(rest, sum(max(0.0, _handover(values) - _engine_checks(values)) for values in steps.values()))
    totals["hand-over"] += outside
    totals["between phases"] += rest - outside
    return {label: seconds for label, seconds in totals.items() if seconds > 0}


def lost_share(totals: Mapping[str, float]) -> float:
    """Share of the wall time that went into neither generating, training nor evaluation."""
    everything = sum(totals.values())
    return sum(totals.get(label, 0.0) for label in LOST) / everything if everything else 0.0


def _phases(driver: Sequence[Span], began: Sequence[float]) -> list[Interval]:
    """Intervals of the driver's phases. Rollouts that a later start did again are recovery."""

    def start_of(span: Span) -> int:
        return sum(start <= span.start for start in began)

    last: dict[int, int] = {}
    for span in driver:
        last[span.rollout_id] = max(last.get(span.rollout_id, 0), start_of(span))
    found = []
    for span in driver:
        if span.rollout_id >= 0 and span.name in _PHASES:
            again = span.name != "sync" and start_of(span) < last[span.rollout_id]
            label = "recovery" if again else _PHASES[span.name]
            found.append(Interval(span.start, span.end, label, span.rollout_id))
        elif span.name == "recover":
            found.append(Interval(span.start, span.end, "engine restart", span.rollout_id))
    return found


def _starts(driver: Sequence[Span], starts: Sequence[tuple[float, float | None]]) -> list[Interval]:
    """From the start of a job to its first phase, and from its end to the next start."""
    found = []
    for number, (start, end) in enumerate(starts):
        following = starts[number + 1][0] if number + 1 < len(starts) else None
        firsts = [span.start for span in driver if span.start >= start and span.rollout_id >= 0]
        first = min((edge for edge in (*firsts, end, following) if edge is not None), default=start)
        found.append(Interval(start, first, "recovery" if number else "starting"))
        if end is not None and following is not None:
            found.append(Interval(end, following, "queue"))
    return found


def _split(interval: Interval, seconds: float, steps: Mapping[int, Mapping[str, float]]) -> list[tuple[str, float]]:
    """Parts of an interval that metrics tell apart."""
    if interval.label == "generating":
        tail = min(seconds, steps.get(interval.rollout_id, {}).get("rollout/tail_time", 0.0))
        return [("longest answers", tail), ("generating", seconds - tail)]
    if interval.label == "weight sync":
        # The sync after rollout r has version r + 1, and its metrics are those of rollout r.
        checks = min(seconds, _engine_checks(steps.get(interval.rollout_id - 1, {})))
        return [("hand-over", checks), ("weight sync", seconds - checks)]
    return [("recovery" if interval.label == "engine restart" else interval.label, seconds)]


def _engine_checks(values: Mapping[str, float]) -> float:
    """Seconds of a sync phase outside the transfer of weights: hand-over of GPUs, and comparing engines."""
    if "perf/sync_time" not in values or "sync/time" not in values:
        return 0.0
    return max(0.0, values["perf/sync_time"] - values["sync/time"])


def _handover(values: Mapping[str, float]) -> float:
    return sum(value for name, value in values.items() if name.startswith("handover/") and name.endswith("_time"))


def bar(totals: Mapping[str, float]) -> str:
    """One bar over the whole run, useful time first; its parts are listed below. Empty without time."""
    everything = sum(totals.values())
    if not everything:
        return ""
    width, x, parts = 1160, 0.0, []
    for label, seconds in totals.items():
        wide = seconds / everything * width
        text = f"{label}: {duration(seconds)}, {100 * seconds / everything:.1f} %"
        parts.append(
            f'<rect class="t-{_name(label)}" x="{x:.1f}" y="0" width="{max(wide, 0.5):.1f}" height="26">'
            f"<title>{escape(text)}</title></rect>"
        )
        if wide > 60:
            parts.append(f'<text class="in" x="{x + 6:.1f}" y="18">{100 * seconds / everything:.0f} %</text>')
        x += wide
    said = ", ".join(f"{label} {100 * seconds / everything:.0f} %" for label, seconds in totals.items())
    keys = "".join(
        f'<span><i class="key t-{_name(label)}"></i>{escape(label)} {100 * seconds / everything:.0f} %</span>'
        for label, seconds in totals.items()
    )
    rows = [
        {
            "cause": label,
            "time": duration(seconds),
            "share": f"{100 * seconds / everything:.1f} %",
            "lost": "yes" if label in LOST else "",
            "meaning": ABOUT[label],
        }
        for label, seconds in totals.items()
    ]
    return (
        f'<figure class="gantt"><svg viewBox="0 0 {width} 26" role="img" '
        f'aria-label="Wall time by cause: {escape(said)}">'
        f'{"".join(parts)}</svg><div class="legend">{keys}</div>'
        f"{details('time by cause', table(rows, numbers=('share',)))}</figure>"
    )


def _name(label: str) -> str:
    return label.replace(" ", "-")
