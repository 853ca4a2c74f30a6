"""Writing that an interruption at any byte cannot make look complete: drafts, fsync, rename, in this order."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vime.errors import BadInput


def write_at(file: int, data: memoryview | bytes, offset: int) -> int:
    """Writes all bytes to their place; returns how many."""
    view, written = memoryview(data), 0
    while written < len(view):
        # A call takes 2 GiB at most.
        written += os.pwrite(file, view[written : written + (1 << 30)], offset + written)
    return written


def write_file(path: Path, data: bytes) -> None:
    """A whole small file: it holds these bytes, on the disk, or what it held before."""
    draft = path.with_name(f".{path.name.lstrip('.')}.draft")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        write_at(file, data, 0)
        os.fsync(file)
    finally:
        os.close(file)
    os.replace(draft, path)


def write_json(path: Path, content: Any) -> None:
    """`write_file` of JSON, indented."""
    write_file(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no such file, or one that was damaged since."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def publish_folder(partial: Path, target: Path) -> None:
    """Renames a finished folder to its place, durably."""
    sync_folder(partial)
    os.rename(partial, target)
    sync_folder(target.parent)


def sync_folder(path: Path) -> None:
    """Brings a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed: int, *, reclaimed: int = 0) -> None:
    """Refuses to start when the disk has not `needed` bytes free, with those that are `reclaimed` before."""
    free = shutil.disk_usage(folder).free + reclaimed
    if free < needed:
        raise BadInput(
            f"{folder} has {free / 2**30:.1f} GiB free, but {needed / 2**30:.1f} GiB will be written: make room"
        )
