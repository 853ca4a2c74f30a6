"""`python -m vime.runs`: list your runs and their states; with `--prune`, old checkpoints of ended runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vime.cli import command
from vime.errors import BadInput
from vime.planning.show import size, table
from vime.run.folder import read_plan
from vime.run.plan import Plan
from vime.run.prune import Old, old_checkpoints, remove
from vime.run.registry import Run, find_run, runs
from vime.run.state import RunState, run_state


def known(names: Sequence[str]) -> list[Run]:
    """The recorded runs, or those named, oldest first. Raises BadInput for an unknown name."""
    recorded = runs()
    if not names:
        return recorded
    folders = [find_run(name) for name in names]
    times = {run.run_dir: run.time for run in recorded}
    return [Run(folder.name, folder, times.get(folder, folder.stat().st_mtime)) for folder in folders]


def read(run_dir: Path) -> tuple[Plan, RunState] | None:
    """Plan and state of a run; None, with a note on stderr, for a run that this version cannot read."""
    try:
        return read_plan(run_dir), run_state(run_dir)
    except BadInput as error:
        print(f"note: {error}", file=sys.stderr)
        return None


def render(found: Sequence[tuple[Run, RunState]]) -> str:
    """One line per run."""
    rows = [
        (
            run.run_name,
            state.state,
            state.job or "-",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.time)),
            "-" if state.rollout is None else f"{state.rollout}/{state.num_rollout}",
            "-" if state.reward is None else f"{state.reward:.3g}",
            run.run_dir,
        )
        for run, state in found
    ]
    return table(("run", "state", "job", "submitted", "rollouts", "reward", "folder"), rows, indent="")


def prune(old: Sequence[Old], *, confirmed: bool) -> str:
    """List checkpoints that can be removed; remove them if confirmed."""
    if not old:
        return "nothing to remove"
    rows = [(one.run, size(one.bytes), one.why, one.path) for one in old]
    total = size(sum(one.bytes for one in old))
    listing = table(("run", "size", "why", "folder"), rows, indent="")
    if not confirmed:
        return f"{listing}\n{total} could be removed: --yes removes it"
    print(listing, flush=True)
    for one in old:
        remove(one)
    return f"{total} removed"


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.runs", description="List your runs, newest last.")
    parser.add_argument("runs", nargs="*", help="names or folders; default: all recorded runs")
    parser.add_argument("--json", action="store_true", help="print the states as JSON, one list")
    parser.add_argument("--prune", action="store_true", help="list old checkpoints of runs that have ended")
    parser.add_argument("--keep", type=int, default=1, help="newest checkpoints that --prune keeps per run; default: 1")
    parser.add_argument("--yes", action="store_true", help="with --prune: remove what is listed")
    args = parser.parse_args(argv)
    if args.keep < 1:
        raise BadInput(f"--keep is {args.keep}: give at least 1")
    if args.yes and not args.prune:
        raise BadInput("--yes works only with --prune")
    chosen = known(args.runs)
    if args.prune:
        # All recorded runs count: a running one may use the folder of one that has ended.
        every = {run.run_dir: read(run.run_dir) for run in (*runs(), *chosen)}
        among = {str(run.run_dir) for run in chosen}
        old = old_checkpoints((pair for pair in every.values() if pair), keep=args.keep, among=among)
        print(prune(old, confirmed=args.yes))
        return 0
    found = [(run, pair[1]) for run in chosen if (pair := read(run.run_dir))]
    if args.json:
        print(json.dumps([state.as_json() for _, state in found]))
    else:
        print(render(found) if found else "no run is recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
