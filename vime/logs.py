"""`python -m vime.logs [RUN]`: print the logs of a run's tasks and its events, merged by time."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from vime.cli import command
from vime.errors import BadInput
from vime.run.folder import read_plan
from vime.run.journal import Event, read_events
from vime.run.logs import Follower, Line, LogFile, Wanted, all_logs, merge, single_ranks, tail_offset
from vime.run.registry import find_run, last_run
from vime.run.state import run_state
from vime.system.text import visible

_POLL_SECONDS = 0.5
_STATE_SECONDS = 5.0
CONTROLLER = "controller"
"""Stage name under which the run's events are shown."""


class Logs:
    """Matching logs and the events. `poll` returns new lines of all of them, including files that appear later."""

    def __init__(
        self, run_dir: Path, *, stage: str | None, node: int | None, rank: int | None, last: int | None = None
    ) -> None:
        """`last`: at most this many of the existing lines will be shown."""
        self._run_dir, self._last = run_dir, last
        self._wanted = Wanted(stage, node, rank, single_ranks(read_plan(run_dir)))
        self._followers: dict[Path, Follower] = {}
        self._with_events = node is None and rank is None and stage in (None, CONTROLLER)
        self._events_seen = 0

    def poll(self) -> list[Line]:
        for log in all_logs(self._run_dir):
            if self._wanted.may_hold(log) and log.path not in self._followers:
                skips = self._last is not None and self._wanted.takes_all(log)
                self._followers[log.path] = Follower(log, tail_offset(log.path, self._last or 0) if skips else 0)
        self._last = None
        lines = [line for follower in self._followers.values() for line in follower.poll()]
        lines = [line for line in lines if self._wanted.takes(line.file)]
        if self._with_events:
            events = read_events(self._run_dir)
            lines += [_line_of(event, self._run_dir) for event in events[self._events_seen :]]
            self._events_seen = len(events)
        return merge(lines)


def _line_of(event: Event, run_dir: Path) -> Line:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    stamp = f"{clock}.{int(event.time % 1 * 1000):03d}"
    text = " ".join(part for part in (event.kind, event.stage, event.node, event.text) if part)
    return Line(stamp, LogFile(CONTROLLER, 0, None, run_dir), text)


def render(line: Line) -> str:
    """One line for a terminal, without control characters."""
    label = CONTROLLER if line.file.stage == CONTROLLER else line.file.label
    return visible(f"{line.stamp[11:]} {label} {line.text}")


def follow(logs: Logs, run_dir: Path, first: int | None) -> Iterator[Line]:
    """The last `first` lines (None: all), then new ones until the run has ended and its logs are read to the end."""
    lines, checked, ended = logs.poll(), 0.0, False
    yield from lines if first is None else lines[-first:] if first else []
    while not ended:
        if time.monotonic() - checked > _STATE_SECONDS:
            ended, checked = run_state(run_dir).ended, time.monotonic()
        yield from logs.poll()
        time.sleep(_POLL_SECONDS)
    yield from logs.poll()


def check_stage(run_dir: Path, stage: str | None) -> None:
    """Raise BadInput for a stage that is not in the plan."""
    names = [CONTROLLER, *(planned.name for planned in read_plan(run_dir).stages)]
    if stage is not None and stage not in names and not (run_dir / "logs" / stage).is_dir():
        raise BadInput(f"--stage is {stage!r}: this run has {', '.join(names)}")


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.logs", description="Print the logs of a run, merged by time.")
    parser.add_argument("run", nargs="?", help="name or folder of the run; default: the last one")
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until the run ends")
    parser.add_argument("-n", "--lines", type=int, help="only the last N lines (of those that are there)")
    parser.add_argument("--stage", help="of one stage; `controller` is the run's events")
    parser.add_argument("--node", type=int, help="of one logical node")
    parser.add_argument("--rank", type=int, help="of one rank of the stage; of training, of one Megatron rank")
    args = parser.parse_args(argv)
    try:
        if args.lines is not None and args.lines < 0:
            raise BadInput(f"--lines is {args.lines}: give 0 or more")
        folder = find_run(args.run) if args.run else last_run()
        check_stage(folder, args.stage)
        logs = Logs(folder, stage=args.stage, node=args.node, rank=args.rank, last=args.lines)
        if args.follow:
            for line in follow(logs, folder, args.lines):
                print(render(line), flush=True)
        else:
            lines = logs.poll()
            for line in lines if args.lines is None else lines[len(lines) - min(args.lines, len(lines)) :]:
                print(render(line))
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
