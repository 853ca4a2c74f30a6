"""One terminal page of a run: what vime.top draws, with rich, from the run's folder alone."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from vime.observe.charts import brief
from vime.planning.show import duration, size
from vime.run.journal import Event, read_events
from vime.run.logs import Follower, Line, all_logs, merge, tail_offset
from vime.run.metrics import read_metrics, series
from vime.run.state import RunState, run_state
from vime.run.usage import NodeUsage, read_queues, read_usage
from vime.system.text import visible

View = Literal["overview", "nodes", "logs", "events"]
VIEWS: tuple[View, ...] = ("overview", "nodes", "logs", "events")
CURVES = (
    ("reward", "rollout/raw_reward"),
    ("length", "rollout/response_length"),
    ("tokens/s", "perf/rollout_tokens_per_s"),
    ("tokens/s/GPU", "perf/tokens_per_gpu_per_s"),
    ("log-prob diff", "train/train_rollout_logprob_abs_diff"),
)
_BARS = "▁▂▃▄▅▆▇█"
_KEPT_LINES = 400
_STATE_SECONDS = 5.0
_MARKS = {"done": "✓", "skipped": "-", "ready": "●", "running": "▶", "failed": "✗", "stopped": "×"}
_STYLES = {
    "failed": "red",
    "cancelled": "yellow",
    "lost": "red",
    "succeeded": "green",
    "running": "cyan",
    "pending": "yellow",
}


@dataclass
class Snapshot:
    """Everything that a page shows, at one moment."""

    state: RunState
    steps: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    events: Sequence[Event] = ()
    nodes: Sequence[NodeUsage] = ()
    queues: Sequence[Sequence[int]] = ()
    lines: Sequence[Line] = ()


class Reader:
    """Reads a run's folder again and again; of logs only what is new, of the scheduler not more than every 5 s."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._followers: dict[Path, Follower] = {}
        self._lines: deque[Line] = deque(maxlen=_KEPT_LINES)
        self._state: RunState | None = None
        self._asked = 0.0

    def read(self) -> Snapshot:
        if self._state is None or time.monotonic() - self._asked > _STATE_SECONDS:
            self._state, self._asked = run_state(self._run_dir), time.monotonic()
        for log in all_logs(self._run_dir):
            if log.path not in self._followers:
                self._followers[log.path] = Follower(log, tail_offset(log.path, 50))
        self._lines.extend(merge(line for follower in self._followers.values() for line in follower.poll()))
        return Snapshot(
            state=self._state,
            steps=read_metrics(self._run_dir),
            events=read_events(self._run_dir)[-_KEPT_LINES:],
            nodes=[usage for usage in read_usage(self._run_dir) if usage.fresh],
            queues=read_queues(self._run_dir),
            lines=list(self._lines),
        )


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as bars of eight heights, the newest last; more values than `width` are averaged in groups."""
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [round(place * len(values) / width) for place in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    span = high - low
    return "".join(_BARS[min(7, int((value - low) / span * 8)) if span else 3] for value in values)


def page(snapshot: Snapshot, view: View, width: int, height: int) -> RenderableType:
    """The page for a terminal of this size. Text of models, logs and hosts is shown without control characters."""
    body = {"overview": _overview, "nodes": _nodes, "logs": _logs, "events": _events}[view]
    keys = "  ".join(f"{n} {name}" if name != view else f"[{n} {name}]" for n, name in enumerate(VIEWS, 1))
    return Group(
        _head(snapshot.state), body(snapshot, width, max(6, height - 6)), Text(f"{keys}   q quit", style="dim")
    )


def _line(text: object, style: str = "") -> Text:
    """One line of text that nothing in it can change."""
    return Text(visible(text).replace("\n", " ").replace("\t", " "), style=style, no_wrap=True, overflow="ellipsis")


def _head(state: RunState) -> RenderableType:
    title = Text.assemble(
        _line(state.run, "bold"), "  ", _line(state.state, _STYLES.get(state.state, "")), no_wrap=True
    )
    if state.job:
        title.append(f"  job {visible(state.job)}")
    if state.rollout is not None:
        title.append(f"  rollout {state.rollout} of {state.num_rollout}")
    if state.seconds_left is not None:
        title.append(f"  {duration(state.seconds_left)} left")
    if state.next_checkpoint is not None:
        title.append(f"  checkpoint after rollout {state.next_checkpoint + 1}")
    reason = state.reason or state.note
    return Group(title, _line(reason, "yellow") if reason else Text(""))


def _overview(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    stages = Text(no_wrap=True, overflow="ellipsis")
    for stage in snapshot.state.stages:
        style = _STYLES.get(stage.state, "dim" if stage.state == "waiting" else "")
        seconds = "" if stage.seconds is None else f" {duration(stage.seconds)}"
        stages.append(f"{_MARKS.get(stage.state, '·')} {visible(stage.name)}{seconds}  ", style=style)
    curves = Table(box=None, padding=(0, 1), show_header=False, expand=True)
    for column in ("name", "last", "curve"):
        curves.add_column(column, no_wrap=True, justify="right" if column == "last" else "left")
    for name, metric in CURVES:
        values = [value for _, value in series(snapshot.steps, metric)]
        if values:
            curves.add_row(name, brief(values[-1]), Text(sparkline(values, max(10, width - 34)), style="cyan"))
    rest = max(3, height - 6 - len(CURVES) - 2)
    parts: list[RenderableType] = [stages, Panel(curves, title="curves", box=box.ROUNDED, title_align="left")]
    if snapshot.queues:
        loads = "  ".join(f"{number}: {sum(ranks)}" for number, ranks in enumerate(snapshot.queues))
        parts.append(_line(f"answers under way on engines  {loads}"))
    parts += [_event_line(event) for event in snapshot.events[-3:]]
    parts += [_log_line(line) for line in snapshot.lines[-max(1, rest - 4) :]]
    return Group(*parts)


def _nodes(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    if not snapshot.nodes:
        return _line("No node has written its use in the last two minutes.", "dim")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("node", "host", "load", "memory", "GPU %", "GPU memory", "hottest"):
        table.add_column(name, no_wrap=True, justify="left" if name in ("host", "GPU %") else "right")
    hosts = snapshot.state.hosts
    for usage in snapshot.nodes[:height]:
        used = [gpu.memory_used for gpu in usage.gpus if gpu.memory_used is not None]
        total = [gpu.memory_total for gpu in usage.gpus if gpu.memory_total is not None]
        heat = [gpu.celsius for gpu in usage.gpus if gpu.celsius is not None]
        table.add_row(
            str(usage.node),
            _line(hosts[usage.node] if usage.node < len(hosts) else ""),
            f"{usage.load:.1f} of {usage.cores}",
            f"{size(usage.memory_used)} of {size(usage.memory_total)}",
            " ".join("-" if gpu.percent is None else f"{gpu.percent:.0f}" for gpu in usage.gpus) or "-",
            f"{size(max(used))} of {size(max(total))}" if used and total else "-",
            f"{max(heat):.0f} °C" if heat else "-",
        )
    return table


def _logs(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    return (
        Group(*(_log_line(line) for line in snapshot.lines[-height:])) if snapshot.lines else _line("no log yet", "dim")
    )


def _events(snapshot: Snapshot, width: int, height: int) -> RenderableType:
    return Group(*(_event_line(event) for event in snapshot.events[-height:]))


def _event_line(event: Event) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    words = (clock, event.kind, event.stage, event.node, event.text)
    style = "red" if event.kind == "run-end" and event.data.get("cause") != "SUCCESS" else ""
    return _line(" ".join(word for word in words if word), style)


def _log_line(line: Line) -> Text:
    return Text.assemble(
        _line(f"{line.stamp[11:19]} {line.file.label} ", "dim"), _line(line.text), no_wrap=True, overflow="ellipsis"
    )
