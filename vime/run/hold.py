"""Runs that keep their nodes after their end (`--hold`), and requests to run in them (`vime.submit --in`).

<run>/control/holding.json       exists while the nodes are free: until when, and how many
<run>/control/next-….json        a request: the run folder of what shall run next; of the holding run's owner alone
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from dataclasses import asdict, dataclass

from vime.errors import BadInput
from vime.run.control import control_folder
from vime.system.files import PRIVATE, read_json, write_json
from vime.system.private import private_folder, read_own
from vime.system.visible import names_in

_HOLDING, _NEXT = "holding.json", "next-"


@dataclass(frozen=True)
class Holding:
    """Nodes that wait."""

    nodes: int
    until: float
    """Unix time at which they are given back if nothing runs before."""


def write_holding(run_dir: str | os.PathLike[str], holding: Holding | None) -> None:
    """Say that the nodes wait, or (None) that they do not."""
    path = control_folder(run_dir) / _HOLDING
    if holding is None:
        path.unlink(missing_ok=True)
    else:
        write_json(private_folder(path.parent) / path.name, asdict(holding), mode=PRIVATE)


def read_holding(run_dir: str | os.PathLike[str]) -> Holding:
    """Nodes that a run holds. Raises BadInput if it holds nothing."""
    if (held := find_holding(run_dir)) is None:
        raise BadInput(f"{run_dir} holds no nodes now: submit it with --hold, or wait until what runs there has ended")
    return held


def find_holding(run_dir: str | os.PathLike[str]) -> Holding | None:
    """Nodes that a run holds; None if it holds nothing."""
    content = read_json(control_folder(run_dir) / _HOLDING)
    return None if content is None or content["until"] < time.time() else Holding(**content)


def request_run(run_dir: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Ask the run that holds nodes to run what another run folder holds."""
    name = f"{_NEXT}{time.time_ns():020d}-{secrets.token_hex(4)}.json"
    write_json(control_folder(run_dir) / name, {"run_dir": str(folder)}, mode=PRIVATE)


def take_request(run_dir: str | os.PathLike[str]) -> str | None:
    """Run folder of the oldest request, which is removed; None without one.

    Raises BadInput for a request that is not the user's own, or that others can read or write; it is removed too.
    """
    folder = control_folder(run_dir)
    for name in sorted(name for name in names_in(folder) if name.startswith(_NEXT) and name.endswith(".json")):
        path = folder / name
        try:
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if mode & 0o077:
                raise BadInput(f"{path} can be read or written by others (mode {mode:o}): it is not run")
            return str(json.loads(read_own(path))["run_dir"])
        except FileNotFoundError:
            # A client of a network file system may show a name for a while after its end.
            continue
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{path} is no request: {error}") from error
        finally:
            path.unlink(missing_ok=True)
    return None


def forget_requests(run_dir: str | os.PathLike[str]) -> list[str]:
    """Remove requests that nobody will run any more; returns their run folders, or what is wrong with them."""
    found = []
    while True:
        try:
            folder = take_request(run_dir)
        except BadInput as error:
            found.append(str(error))
            continue
        if folder is None:
            return found
        found.append(folder)
