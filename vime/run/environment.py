"""Environment variables that a recipe or profile sets for a run's processes; secrets are given by reference.

A value `variable:NAME` is read from the environment of the submission, `file:PATH` from a private file of the user; the
secret itself is written to no plan, script or page.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path

from vime.errors import BadInput
from vime.system.private import read_own
from vime.system.redact import has_secret

VARIABLE, FILE = "variable:", "file:"


def resolve(given: Mapping[str, str], environ: Mapping[str, str]) -> dict[str, str]:
    """Values of the variables. Raises BadInput if a reference's target is missing or readable by others."""
    return {name: _value(name, value, environ) for name, value in given.items()}


def export_lines(given: Mapping[str, str]) -> list[str]:
    """Shell lines that set the variables, free of secrets: one given as plain text reaches only the tasks."""
    lines = []
    for name, value in given.items():
        if value.startswith(VARIABLE):
            lines.append(f'export {name}="${{{value.removeprefix(VARIABLE)}}}"')
        elif value.startswith(FILE):
            path = Path(value.removeprefix(FILE)).expanduser()
            lines.append(f'export {name}="$(cat {shlex.quote(str(path))})"')
        elif not has_secret(name, value):
            lines.append(f"export {name}={shlex.quote(value)}")
    return lines


def _value(name: str, value: str, environ: Mapping[str, str]) -> str:
    if value.startswith(VARIABLE):
        source = value.removeprefix(VARIABLE)
        if source not in environ:
            raise BadInput(f"env {name} is {value}, but {source} is not set: export {source} before you submit")
        return environ[source]
    if value.startswith(FILE):
        path = Path(value.removeprefix(FILE)).expanduser()
        try:
            content, mode = read_own(path), os.stat(path).st_mode
        except OSError as error:
            raise BadInput(f"env {name} is {value}: cannot read it: {error.strerror}") from error
        if mode & 0o077:
            raise BadInput(f"env {name}: {path} can be read by others (mode {stat.S_IMODE(mode):o}): chmod 600 {path}")
        try:
            return content.decode().strip()
        except UnicodeDecodeError as error:
            raise BadInput(f"env {name}: {path} is not text") from error
    return value
