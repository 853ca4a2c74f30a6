"""`vime plan`: print the plan of a new run or of an existing one."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from vime.cli import build_parser, command, split_flags
from vime.errors import BadInput
from vime.models.arguments import shell_arguments
from vime.models.config import ModelConfig
from vime.planning.needs import as_json, needs_of, render_needs
from vime.planning.request import plan_from
from vime.planning.show import render, render_placement
from vime.planning.svg import placement_svg
from vime.recipe import files
from vime.run.folder import read_plan
from vime.run.plan import Plan
from vime.run.registry import find_run


@command
def main(argv: Sequence[str]) -> int:
    own, flags = split_flags(argv)
    parser = build_parser("python -m vime.plan", "Print the plan of a new run, or of an existing one with --run.")
    parser.add_argument("--run", help="name or folder of an existing run: print its plan")
    parser.add_argument("--json", action="store_true", help="print plan and needs as JSON")
    parser.add_argument("--placement", action="store_true", help="print one line per GPU: node and ranks")
    parser.add_argument("--svg", metavar="FILE", help="with --placement: also write the map as SVG")
    parser.add_argument(
        "--print-model-args", metavar="MODEL", help="print a model's Megatron arguments: its HF folder or name"
    )
    args = parser.parse_args(own)
    if args.print_model_args:
        print(shlex.join(shell_arguments(read_model(args.print_model_args))))
        return 0
    if args.flags:
        raise BadInput(f"unexpected argument {args.flags[0]!r}: options of the recipe follow --")
    if args.svg and not args.placement:
        raise BadInput(f"--svg {args.svg} is the placement map: give --placement with it")
    plan: Plan = read_plan(find_run(args.run)) if args.run else plan_from(args, flags, required=False, run_folder=False)
    if args.placement:
        if args.svg:
            _write(Path(args.svg), placement_svg(plan))
        print(render_placement(plan), end="")
        return 0
    needs = needs_of(plan)
    if args.json:
        print(json.dumps(as_json(plan, needs), indent=1))
    else:
        _show(f"{render(plan)}\n{render_needs(plan, needs)}")
    return 0


def _show(text: str) -> None:
    """Print a plan: with rich on a terminal, as it is to a file or pipe."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from vime.observe.terminal import print_sections

    print_sections(text)


def read_model(name: str) -> ModelConfig:
    """The model of an HF folder, or of a file in `configs/models/` by its name."""
    if (Path(name) / "config.json").is_file():
        return ModelConfig.from_folder(name)
    return ModelConfig.from_hf(files.read(files.find("models", name)))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"--svg {path}: {error.strerror}: give a file that can be written") from error


if __name__ == "__main__":
    sys.exit(main())
