"""`python -m vime.report [RUN]`: write the report of a run; of several runs, a page that compares them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vime.cli import command
from vime.errors import BadInput
from vime.observe.compare import compare_page
from vime.observe.page import page
from vime.observe.summary import read_run
from vime.observe.timeline import chrome_trace
from vime.run.journal import read_events
from vime.run.registry import find_run, last_run
from vime.system.files import PRIVATE, write_file
from vime.system.redact import redact


def write_report(run_dir: str | Path) -> str:
    """Write `report.html` and `trace.json` (Perfetto) into the run folder; return the run's last line."""
    folder = Path(run_dir)
    run = read_run(folder, [event.model_dump() for event in read_events(folder)])
    write_file(folder / "trace.json", json.dumps(chrome_trace(run.spans)), mode=PRIVATE)
    write_file(folder / "report.html", redact(page(run)), mode=PRIVATE)
    return run.last_line(folder / "report.html")


def write_comparison(run_dirs: Sequence[Path], target: Path, title: str) -> str:
    """Write a page that compares runs; return a line that says where. Raises BadInput where it cannot be written."""
    runs = [read_run(folder, [event.model_dump() for event in read_events(folder)]) for folder in run_dirs]
    try:
        write_file(target, compare_page(runs, title), mode=PRIVATE)
    except OSError as error:
        raise BadInput(f"--output {target}: {error.strerror}: give a file that can be written") from error
    return f"{len(runs)} runs compared: {target}"


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vime.report",
        description="Write the report of a run; of several runs, a page that compares them.",
    )
    parser.add_argument("runs", nargs="*", metavar="run", help="names or folders of runs; default: the last one")
    parser.add_argument("--output", metavar="FILE", help="file of a comparison; default: compare.html of the first run")
    args = parser.parse_args(argv)
    folders = [find_run(name) for name in args.runs] or [last_run()]
    if len(folders) == 1:
        if args.output:
            raise BadInput(f"--output {args.output} is for a comparison: give two runs or more")
        print(write_report(folders[0]))
        return 0
    target = Path(args.output) if args.output else folders[0] / "compare.html"
    print(write_comparison(folders, target, " / ".join(folder.name for folder in folders[:3])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
