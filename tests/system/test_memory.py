"""Memory of this machine, and what this process keeps of it."""

from __future__ import annotations

import subprocess
import sys

from tests.support import patience
from vime.system.memory import memory_available

KEEPS = """
from pathlib import Path
from vime.system.memory import return_free_memory
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
pieces = [bytearray(60_000) for _ in range(4000)]
last = bytearray(60_000)
del pieces
kept = rss()
return_free_memory()
print(kept - rss())
"""
"""Pieces too small for mmap below one that stays: glibc keeps them all for itself."""


def test_some_memory_is_available() -> None:
    assert memory_available() > 1 << 20


def test_freed_pieces_go_back_to_the_kernel() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEEPS], capture_output=True, text=True, timeout=patience.PROCESS, check=True
    )
    assert int(done.stdout) > 150 << 20
