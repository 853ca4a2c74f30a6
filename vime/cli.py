"""Shared by all commands: the parser of a plan's options, and how a command ends."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NoReturn

from vime.errors import BadInput, VimeError
from vime.recipe import files
from vime.recipe.flags import flag, recipe_options
from vime.system.redact import redact

INTERRUPTED = 128 + signal.SIGINT


def command(run: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Wrap a function of arguments as a command's `main`; without arguments it takes the process's.

    A VimeError becomes one line on stderr and its exit code, Ctrl-C a line and 130, as in a shell. A closed pipe
    (`| head`) is no error.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            code = run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        except VimeError as error:
            print(f"error: {redact(str(error))}", file=sys.stderr)
            return int(error.cause)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return code

    return main


DEFAULT_RECIPE = "deepseek-r1"


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, like any bad input."""

    def error(self, message: str) -> NoReturn:
        named = re.search(r"--([\w-]+)", message)
        name = named[1].replace("-", "_") if named else ""
        if name in recipe_options() or name.startswith("vllm_"):
            raise BadInput(f"{message}: options of the recipe follow --")
        word = flag(name) if name else ""
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near and near[0] != word else f"see {self.prog} --help"
        raise BadInput(f"{message}: {hint}")


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The options of a plan, common to vime.submit and vime.plan."""
    epilog = "Options of the recipe follow --, as in: -- --lr 2e-6 --colocate. --list-options prints them all."
    parser = Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False)
    add = parser.add_argument
    recipes, clusters = ", ".join(files.names("recipes")), ", ".join(files.names("clusters"))
    add("--recipe", default=DEFAULT_RECIPE, help=f"recipe: a YAML file, or one of {recipes}; default: {DEFAULT_RECIPE}")
    add("--nodes", type=_number_or_auto, help="nodes, without spares; auto: fewest that fit; default: the recipe's")
    add(
        "--node-memory", type=_gigabytes, metavar="GB",
        help="host memory of a node; default: the profile's, then what sinfo shows",
    )  # fmt: skip
    add("--cluster", help=f"cluster profile: a YAML file, or one of {clusters}; default: ask sinfo")
    add("--base-dir", help="shared folder of models, data and checkpoints; default: $BASE_DIR, then the profile's")
    add("--run-name", help="name of the run; default: the recipe's name and the time")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--run-dir", help="folder of the run; one that holds a run resumes it")
    place.add_argument("--runs-dir", help="parent of the run's folder; default: $BASE_DIR/runs")
    add("--shape", choices=("allocation", "chain"), default="allocation", help="one Slurm job, or one job per stage")
    add(
        "--spares",
        type=int,
        default=0,
        help="extra nodes that replace nodes rejected by preflight or lost later; default: 0",
    )
    add("--time", help="time limit: minutes, H:M:S or D-H; default: the profile's")
    add("--partition", help="Slurm partition; default: the profile's, then Slurm's default")
    add("--no-snapshot", action="store_true", help="run the code as of job start instead of a copy taken now")
    add(
        "--verify", choices=("quick", "deep"), default="quick",
        help="check of finished stages' outputs before they are reused: sizes, times and samples, or all bytes",
    )  # fmt: skip
    add("--list-options", action="store_true", help="print every option of the recipe with its value and meaning")
    add("flags", nargs="*", metavar="-- FLAGS", help=argparse.SUPPRESS)
    return parser


def _number_or_auto(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"-?\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return int(text)


def _gigabytes(text: str) -> int:
    """Bytes of a number of GB (10^9)."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GB above 0")
    return int(found * 1e9)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own arguments and those after `--`."""
    words = list(argv)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]
