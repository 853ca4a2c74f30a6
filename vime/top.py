"""`python -m vime.top [RUN]`: one terminal page of a run that refreshes itself; keys switch what it shows."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live

from vime.cli import command
from vime.observe.top import VIEWS, Reader, View, page
from vime.run.registry import find_run, last_run


@contextlib.contextmanager
def keys(descriptor: int) -> Iterator[None]:
    """Key presses arrive one by one and are not echoed; the terminal is as before afterwards."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def watch(run_dir: Path, console: Console, every_s: float) -> None:
    """Draw until the run has ended or `q` is pressed; then leave the last page on the terminal."""
    reader, view, descriptor = Reader(run_dir), VIEWS[0], sys.stdin.fileno()
    snapshot = reader.read()
    with keys(descriptor), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(page(snapshot, view, console.width, console.height), refresh=True)
            if snapshot.state.ended:
                break
            pressed = _pressed(descriptor, every_s)
            if "q" in pressed:
                break
            view = _chosen(pressed, view)
            snapshot = reader.read()
    console.print(page(snapshot, view, console.width, console.height))


def _pressed(descriptor: int, seconds: float) -> str:
    """Keys pressed within this time; returns at the first."""
    ready, _, _ = select.select([descriptor], [], [], seconds)
    return os.read(descriptor, 64).decode(errors="replace") if ready else ""


def _chosen(pressed: str, view: View) -> View:
    numbers = [int(key) for key in pressed if key.isdigit() and 1 <= int(key) <= len(VIEWS)]
    return VIEWS[numbers[-1] - 1] if numbers else view


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vime.top",
        description="Show one terminal page of a run: stages, curves, nodes, engines, events, logs. "
        "Keys 1 to 4 switch, q ends it; it ends with the run.",
    )
    parser.add_argument("run", nargs="?", help="name or folder of the run; default: the last one")
    parser.add_argument("--once", action="store_true", help="print the page once; the default without a terminal")
    parser.add_argument("--view", choices=VIEWS, default=VIEWS[0], help="what --once prints; default: overview")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two pages; default: 2")
    args = parser.parse_args(argv)
    folder = find_run(args.run) if args.run else last_run()
    console = Console(highlight=False)
    if args.once or not (sys.stdin.isatty() and console.is_terminal):
        console.print(page(Reader(folder).read(), args.view, console.width, 40))
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        watch(folder, console, max(0.2, args.every))
    return 0


if __name__ == "__main__":
    sys.exit(main())
