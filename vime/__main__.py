"""`vime VERB ARGUMENTS`: the commands by their names; `vime submit` is `python -m vime.submit`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import vime
from vime.cli import command
from vime.errors import BadInput

VERBS = {
    "submit": "plan a run and submit it, or run it on this machine",
    "plan": "print the plan of a run: memory, placement, traffic",
    "fetch": "download checkpoint and data",
    "status": "show what a run is doing",
    "top": "watch a run on one terminal page",
    "logs": "print and follow the logs of a run",
    "attach": "open a shell on a node of a run",
    "cancel": "end a run",
    "runs": "list your runs",
    "report": "write the HTML report of a run",
    "eval": "evaluate a checkpoint of a run, or an HF folder",
    "sweep": "submit variants of a run from a file",
}


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {verb:<8} {about}" for verb, about in VERBS.items()]
    return "\n".join(("usage: vime VERB ...", "", *lines, "", "vime VERB --help lists the options of a verb."))


@command
def main(argv: Sequence[str]) -> int:
    verb, *rest = argv or ("--help",)
    if verb in ("-h", "--help"):
        print(usage())
        return 0
    if verb in ("-V", "--version"):
        print(f"vime {vime.__version__}")
        return 0
    if verb not in VERBS:
        raise BadInput(f"there is no verb {verb}: give one of {', '.join(VERBS)}")
    return importlib.import_module(f"vime.{verb}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
