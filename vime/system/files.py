"""Files and folders that appear whole: written as a draft, brought to the disk, renamed to their name.

An interruption at any byte leaves what was there before. A draft has a name that nobody can foresee and is opened with
O_EXCL and O_NOFOLLOW, so in a folder that others can write to nobody can plant a file or link in its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vime.errors import BadInput

PRIVATE, READABLE = 0o600, 0o644
"""Modes of files: of a run, and of artefacts that users share. The umask can only take away from them."""
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DRAFT = ".draft"


@contextlib.contextmanager
def draft(path: Path, *, mode: int) -> Iterator[int]:
    """Descriptor of an empty draft, which replaces `path` when the block ends well and is removed when it does not."""
    name = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(8)}{_DRAFT}")
    file = os.open(name, _CREATE, mode)
    try:
        try:
            yield file
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def remove_drafts(path: Path) -> None:
    """Removes what killed writers of `path` left. Only for a caller that is the one writer of this path."""
    prefix = f".{path.name.lstrip('.')}."
    for entry in os.scandir(path.parent):
        if entry.name.startswith(prefix) and entry.name.endswith(_DRAFT):
            os.unlink(entry.path)


def write_at(file: int, data: memoryview | bytes, offset: int) -> int:
    """Writes all bytes at an offset; returns their number."""
    view, written = memoryview(data), 0
    while written < len(view):
        # One call writes 2 GiB at most.
        written += os.pwrite(file, view[written : written + (1 << 30)], offset + written)
    return written


def write_file(path: Path, data: bytes | str, *, mode: int) -> None:
    """Replaces a file by one with this content, durably; text as UTF-8, with escapes for lone surrogates."""
    with draft(path, mode=mode) as file:
        write_at(file, data.encode(errors="backslashreplace") if isinstance(data, str) else data, 0)


def write_json(path: Path, content: Any, *, mode: int) -> None:
    """Replaces a file by indented JSON."""
    write_file(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", mode=mode)


def read_json(path: Path) -> Any:
    """Content of a JSON file; None where the file is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def replace_link(link: Path, target: str | os.PathLike[str]) -> None:
    """Makes `link` a symbolic link to `target`, whatever it was before."""
    name = link.with_name(f".{link.name}.{secrets.token_hex(8)}{_DRAFT}")
    name.symlink_to(target)
    os.replace(name, link)


def publish_file(partial: Path, target: Path) -> None:
    """Renames a file that was written over several attempts and is on the disk."""
    os.replace(partial, target)


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
    """Raises BadInput where the disk has fewer than `needed` bytes free, once `reclaimed` bytes are removed."""
    free = shutil.disk_usage(folder).free + reclaimed
    if free < needed:
        raise BadInput(
            f"{folder} has {free / 2**30:.1f} GiB free, but {needed / 2**30:.1f} GiB will be written: make room"
        )
