"""`python -m vime.plan`: prints the plan of a run that is to be, or of one that is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vime.errors import BadInput, VimeError
from vime.planning.io import read_plan
from vime.planning.registry import find_run
from vime.planning.show import render, render_placement
from vime.planning.types import Plan
from vime.submit import build_parser, plan_from, split_flags


def run(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    parser = build_parser("python -m vime.plan", "Print the plan of a run that is to be, or of one that is there.")
    parser.add_argument("--run", help="name or folder of a run: print its plan instead of a new one")
    parser.add_argument("--json", action="store_true", help="the whole plan for programs")
    parser.add_argument("--placement", action="store_true", help="a line a GPU: node, Megatron and engine ranks")
    args = parser.parse_args(own)
    if args.flags:
        raise BadInput(f"unexpected argument {args.flags[0]!r}: options of the recipe stand after --")
    plan: Plan = read_plan(find_run(args.run)) if args.run else plan_from(args, flags, required=False, run_folder=False)
    if args.json:
        print(plan.model_dump_json(indent=1))
    else:
        print(render_placement(plan) if args.placement else render(plan), end="")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        # The reader, `head` for one, has what it wanted.
        sys.stderr.close()
        return 0
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)


if __name__ == "__main__":
    sys.exit(main())
