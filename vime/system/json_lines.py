"""Files of one JSON object per line, appended to by processes that may be killed and read while they grow.

A crash, a full disk or a foreign writer leaves torn lines, runs of NUL bytes and lines of something else. They cost
themselves only: readers skip and count them, and a writer that opens the file closes a torn end.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

Line = TypeVar("Line")
LONGEST_LINE = 64 * 2**20
"""Bytes; a longer line is skipped without being held in memory."""
_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)


class LineFile:
    """Appends whole lines, each with one write where the system takes it whole; mode 0600 when it is made."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file cannot be opened."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")

    def add(self, value: Mapping[str, Any]) -> None:
        """Appends an object. Raises OSError; a part of the line may then stand there."""
        data = encode_line(value)
        while data:
            data = data[self.append(data) :]

    def append(self, data: bytes) -> int:
        """Appends bytes of lines; returns how many were taken."""
        return os.write(self._descriptor, data)

    def sync(self) -> None:
        """Brings what was appended to the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def encode_line(value: Mapping[str, Any]) -> bytes:
    """An object as a line of ASCII."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class Lines:
    """The objects of a file, read one at a time; after the last one `skipped` is the number of lines without one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.skipped = 0

    def read(self, parse: Callable[[dict[str, Any]], Line]) -> Iterator[Line]:
        """Results of `parse` for each object. A line for which it raises one of the usual errors is skipped.

        A file that is missing has no lines. Raises OSError for one that cannot be read.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(self._path, "rb"))
            except FileNotFoundError:
                return
            for text, finished in self._texts(file):
                try:
                    value = json.loads(text)
                    if not isinstance(value, dict):
                        raise TypeError("not an object")
                    line = parse(value)
                except _ERRORS:
                    self.skipped += finished
                    continue
                yield line

    def _texts(self, file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
        """Lines without surrounding blanks and NUL bytes, and False for an end that its writer has not finished."""
        while text := file.readline(LONGEST_LINE):
            finished = text.endswith(b"\n")
            if not finished and len(text) == LONGEST_LINE:
                while (text := file.readline(LONGEST_LINE)) and not text.endswith(b"\n"):
                    pass
                self.skipped += 1
            elif content := text.strip(b"\0 \t\r\n"):
                yield content, finished
            else:
                self.skipped += b"\0" in text


def damage_note(damage: Mapping[str, int]) -> str:
    """Counts of lines that could not be read, by file, in a few words; empty where there are none."""
    counts = ", ".join(f"{count} of {name}" for name, count in damage.items() if count)
    return f"lines that could not be read: {counts}" if counts else ""
