"""`python -m vime.rollout.serve ARGS`: `vllm serve ARGS` that ends with the process that started it.

vLLM's `vllm` command needs a distribution of that name, which its CPU build is not, and the API server module has no
headless followers. So this module calls the `serve` subcommand directly.
"""

from __future__ import annotations

import os
import sys

from vime.system.processes import PARENT_VARIABLE, end_with_parent


def main(argv: list[str]) -> None:
    if parent := os.environ.get(PARENT_VARIABLE):
        end_with_parent(int(parent))
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    subcommand = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    subcommand.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
    args = parser.parse_args(["serve", *argv])
    assert args is not None
    configure_logging_from_args(args)
    subcommand.validate(args)
    subcommand.cmd(args)


if __name__ == "__main__":
    main(sys.argv[1:])
