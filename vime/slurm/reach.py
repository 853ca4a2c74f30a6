"""Which nodes answer now. Slurm itself takes a silent node for lost only after SlurmdTimeout, by default 300 s."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from vime.slurm.client import SlurmError, call

CONNECT_S = 4.0
PATIENCE_S = 6.0
"""A slurmd that an admin restarts refuses connections for a moment."""
_DEFAULT_PORT = 6818


def unreachable(nodelist: str, gone: Collection[str] = ()) -> dict[str, str]:
    """Nodes whose slurmd takes no connection from here, and how it fails; empty when Slurm does not say where they are.
    `gone`: those that did not answer the last time, which get no time to come back.

    srun takes the same way, so no firewall is between them that would not stop every step.
    """
    try:
        text = call("scontrol", "show", "node", "-o", nodelist, seconds=3.0)
    except SlurmError:
        return {}
    places = parse_places(text, default_port=_slurmd_port())
    with ThreadPoolExecutor(min(64, max(1, len(places)))) as pool:
        patience = [0.0 if name in gone else PATIENCE_S for name in places]
        answers = dict(zip(places, pool.map(_refusal, places.values(), patience), strict=True))
    return {name: f"does not answer ({how})" for name, how in answers.items() if how is not None}


def parse_places(text: str, *, default_port: int) -> dict[str, tuple[str, int]]:
    """(address, port of slurmd) by node name, from `scontrol show node -o`, which names only unusual ports."""
    found = {}
    for line in text.splitlines():
        words = dict(re.findall(r"(\w+)=(\S+)", line))
        if "NodeName" in words and "NodeAddr" in words:
            found[words["NodeName"]] = (words["NodeAddr"], int(words.get("Port", default_port)))
    return found


def _slurmd_port() -> int:
    try:
        match = re.search(r"^SlurmdPort\s*=\s*(\d+)", call("scontrol", "show", "config", seconds=3.0), re.MULTILINE)
    except SlurmError:
        return _DEFAULT_PORT
    return int(match[1]) if match else _DEFAULT_PORT


def _refusal(place: tuple[str, int], patience_s: float) -> str | None:
    """Why a port takes no connection; None where it does, if need be after `patience_s` seconds."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection(place, timeout=CONNECT_S).close()
        except OSError as error:
            if time.monotonic() + 1.0 >= deadline:
                return str(error.strerror or error).lower()
            time.sleep(1.0)
        else:
            return None
