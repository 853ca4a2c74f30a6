"""`python -m vime.report [RUN]`: write the report of a run; of several runs, a page that compares them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vime.cli import command
from vime.errors import BadInput
from vime.observe.pages import write_comparison, write_report
from vime.run.registry import find_run, last_run


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
