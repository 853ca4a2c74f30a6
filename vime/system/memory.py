"""Memory of this machine."""

from __future__ import annotations

import ctypes
from pathlib import Path


def memory_available() -> int:
    """Bytes that the kernel could give to new processes without swapping (MemAvailable)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def return_free_memory() -> None:
    """Give the kernel the free memory that glibc's heaps keep. Does nothing with another C library.

    A save makes and drops as many bytes as a checkpoint has; heaps that keep the pieces grow from save to save.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
