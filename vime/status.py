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

_WATCH_SECONDS = 2.0
_CLEAR = "\x1b[H\x1b[2J"
_SHOWN = (
    ("rollout/raw_reward", "reward"),
    ("perf/rollout_tokens_per_s", "tokens generated a second"),
    ("perf/train_tokens_per_s", "trained a second"),
)


def render(state: RunState) -> str:
    """The state as lines of plain text."""
    job = f", job {state.job}" if state.job else ""
    lines = [f"{state.run}: {state.state}{job}" + (f", start {state.restart}" if state.restart else "")]
    if state.reason:
        lines.append(f"  {state.reason}")
    if state.note:
        lines.append(f"  note: {state.note}")
    for one in state.jobs:
        told = one.state + (f" ({one.reason})" if one.reason else "")
        lines.append(f"    job {one.job_id} {one.link or '':8} {told or 'ended'}")
    if state.expected_start and state.expected_start > time.time():
        lines.append(f"  expected to start {time.strftime('%Y-%m-%d %H:%M', time.localtime(state.expected_start))}")
    marks = {"done": "+", "skipped": "-", "ready": "*", "running": ">", "failed": "!", "stopped": "x"}
    for stage in state.stages:
        seconds = "" if stage.seconds is None else f"  {stage.seconds:.0f} s"
        lines.append(f"  {marks.get(stage.state, ' ')} {stage.name:12} {stage.state}{seconds}")
    if state.rollout is not None:
        shown = [f"{label} {state.metrics[name]:.4g}" for name, label in _SHOWN if name in state.metrics]
        lines.append(f"  rollout {state.rollout} of {state.num_rollout}: {', '.join(shown)}")
    if state.next_checkpoint is not None:
        lines.append(f"  next checkpoint after rollout {state.next_checkpoint + 1}")
    if state.seconds_left is not None:
        hours, seconds = divmod(int(state.seconds_left), 3600)
        lines.append(f"  time left {hours}:{seconds // 60:02d} h")
    lines.append(f"  {state.run_dir}")
    return "\n".join(lines)


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
            if args.watch and not args.json and sys.stdout.isatty():
                print(_CLEAR, end="")
            print(json.dumps(state.as_json()) if args.json else render(state), flush=True)
            if not args.watch or state.ended:
                return 0
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
