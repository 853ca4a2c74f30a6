"""`python -m vime.report [RUN]`: write the run's report, one HTML file, and print the run's last line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vime.cli import command
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


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.report", description="Write the report of a run.")
    parser.add_argument("run", nargs="?", help="name or folder of the run; default: the last one")
    args = parser.parse_args(argv)
    print(write_report(find_run(args.run) if args.run else last_run()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
