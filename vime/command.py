"""How every command ends."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence

from vime.errors import VimeError


def command(run: Callable[[Sequence[str]], int]) -> Callable[..., int]:
    """Makes a command's `main` of what it does with its arguments, by default the process's.

    A VimeError becomes one line on stderr and its exit code. A reader that has seen enough, as `| head` has, is no
    error.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            code = run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        except VimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return int(error.cause)
        except BrokenPipeError:
            # Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return code

    return main
