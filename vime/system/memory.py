"""Memory of this machine."""

from __future__ import annotations

from pathlib import Path


def memory_available() -> int:
    """Bytes that the kernel could give to new processes without swapping (MemAvailable)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
