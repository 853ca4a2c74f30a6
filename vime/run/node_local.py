"""Name of the job's folder for node-local files, and length of socket paths below it. Pure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

NODE_TMP = "VIME_NODE_TMP"
"""Environment variable: folder of node-local files, default `/tmp`."""
SOCKET_CHARACTERS = 107
"""Longest path of a Unix socket on Linux."""
_LONGEST_BELOW = "/ray/session_2026-01-02_03-04-05_678901_1234567/sockets/plasma_store"
"""Longest path of a socket below the job's folder, one of Ray's."""
_JOB = "12345678"


def base_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder for all of this user's jobs on a node."""
    return Path(environ.get(NODE_TMP, "/tmp")) / f"vime-{os.getuid()}"


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Folder of compiled kernels of all this user's jobs on a node; it stays when a job ends."""
    return base_folder(environ) / "caches"


def longest_socket(environ: Mapping[str, str], job: str = _JOB) -> int:
    """Characters in a job's longest socket path; by default for an id of eight digits."""
    return len(os.fsencode(base_folder(environ) / job)) + len(_LONGEST_BELOW)
