"""`python -m vime.status [RUN]`: show what a run is doing; by default the last run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from vime.cli import command
from vime.run.registry import find_run, last_run
from vime.run.state import RunState, run_state
from vime.system.text import visible

_WATCH_SECONDS = 2.0
_CLEAR = "\x1b[H\x1b[2J"
_SHOWN = (
    ("rollout/raw_reward", "reward"),
    ("perf/rollout_tokens_per_s", "tokens generated per second"),
    ("perf/train_tokens_per_s", "trained per second"),
)


_MARKS = {"done": "+", "skipped": "-", "ready": "*", "running": ">", "failed": "!", "stopped": "x"}
_COLOURS = {"failed": "red", "lost": "red", "succeeded": "green", "done": "green", "running": "cyan", "ready": "cyan",
            "waiting": "dim", "skipped": "dim", "pending": "yellow", "requeued": "yellow",
            "cancelled": "yellow"}  # fmt: skip


def headline(state: RunState) -> str:
    """Run, state, job and number of the start."""
    job = f", job {state.job}" if state.job else ""
    return visible(f"{state.run}: {state.state}{job}" + (f", start {state.restart}" if state.restart else ""))


def reasons(state: RunState) -> list[str]:
    """Lines about why the run is in its state, and the jobs of a chain."""
    lines = [state.reason] if state.reason else []
    if state.note:
        lines.append(f"note: {state.note}")
    for one in state.jobs:
        known = one.state + (f" ({one.reason})" if one.reason else "")
        lines.append(f"  job {one.job_id} {one.link or '':8} {known or 'ended'}")
    if state.expected_start and state.expected_start > time.time():
        lines.append(f"expected to start {time.strftime('%Y-%m-%d %H:%M', time.localtime(state.expected_start))}")
    return [visible(line) for line in lines]


def progress(state: RunState) -> list[str]:
    """Lines about rollouts, checkpoint, time and place."""
    lines = []
    if state.rollout is not None:
        shown = [f"{label} {state.metrics[name]:.4g}" for name, label in _SHOWN if name in state.metrics]
        lines.append(f"rollout {state.rollout} of {state.num_rollout}: {', '.join(shown)}")
    if state.next_checkpoint is not None:
        lines.append(f"next checkpoint after rollout {state.next_checkpoint + 1}")
    if state.seconds_left is not None:
        hours, seconds = divmod(int(state.seconds_left), 3600)
        lines.append(f"time left {hours}:{seconds // 60:02d} h")
    return [visible(line) for line in (*lines, state.run_dir)]


def render(state: RunState) -> str:
    """The state as lines of plain text, without control characters."""
    lines = [headline(state), *(f"  {line}" for line in reasons(state))]
    for stage in state.stages:
        seconds = "" if stage.seconds is None else f"  {stage.seconds:.0f} s"
        lines.append(f"  {_MARKS.get(stage.state, ' ')} {visible(stage.name):12} {visible(stage.state)}{seconds}")
    return "\n".join([*lines, *(f"  {line}" for line in progress(state))])


def draw(state: RunState) -> None:
    """Print the state to a terminal, the stages as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(headline(state), style=f"bold {_COLOURS.get(state.state, '')}".strip()))
    for line in reasons(state):
        console.print(Text(line, style="yellow"))
    stages = Table("stage", "state", "seconds", box=None, padding=(0, 2), header_style="dim")
    stages.columns[2].justify = "right"
    for stage in state.stages:
        seconds = "" if stage.seconds is None else f"{stage.seconds:.0f}"
        stages.add_row(Text(visible(stage.name)), Text(stage.state, style=_COLOURS.get(stage.state, "")), seconds)
    console.print(stages)
    for line in progress(state):
        console.print(Text(line, overflow="fold"))


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.status", description="Show what a run is doing.")
    parser.add_argument("run", nargs="?", help="name or folder of the run; default: the last one")
    parser.add_argument("--json", action="store_true", help="print the state as JSON")
    parser.add_argument("--watch", action="store_true", help="refresh until the run has ended")
    args = parser.parse_args(argv)
    try:
        folder = find_run(args.run) if args.run else last_run()
        while True:
            state = run_state(folder)
            if args.json or not sys.stdout.isatty():
                print(json.dumps(state.as_json()) if args.json else render(state), flush=True)
            else:
                print(_CLEAR if args.watch else "", end="", flush=True)
                draw(state)
            if not args.watch or state.ended:
                return 0
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
