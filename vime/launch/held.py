"""`python -m vime.launch.held --run-dir DIR`: the controller of a run inside nodes that another run holds."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import vime
from vime.cli import command
from vime.run.folder import read_plan
from vime.run.scheduler import find_scheduler


@command
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.launch.held")
    parser.add_argument("--run-dir", required=True)
    args = parser.parse_args(argv)
    plan = read_plan(args.run_dir)
    if plan.code is not None and not Path(vime.__file__).is_relative_to(plan.code):
        # The run's own code takes over; the holding run's is first on the path until here.
        before = os.environ.get("PYTHONPATH", "")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [plan.code, before])), "PYTHONSAFEPATH": "1"}
        os.execve(sys.executable, [sys.executable, "-u", "-m", "vime.launch.held", "--run-dir", args.run_dir], env)
    return int(find_scheduler(plan.cluster.kind).control(args.run_dir))


if __name__ == "__main__":
    sys.exit(main())
