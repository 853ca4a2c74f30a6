"""The logs of a run: finding them, following them, merging them by the time that stands before every line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NAME = re.compile(r"node(\d+)(?:\.rank(\d+))?\.log")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ")
STAMP_LENGTH = 24


@dataclass(frozen=True)
class LogFile:
    """One task's log."""

    stage: str
    node: int
    rank: int | None
    path: Path

    @property
    def label(self) -> str:
        return f"{self.stage}/node{self.node:02d}" + (f".rank{self.rank}" if self.rank is not None else "")


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    stamp: str
    """`2026-01-31 12:00:00.123`; that of the line before where the line has none."""
    file: LogFile
    text: str


def find_logs(
    run_dir: str | Path, *, stage: str | None = None, node: int | None = None, rank: int | None = None
) -> list[LogFile]:
    """The logs of tasks that match, by stage, node and rank."""
    found = []
    for path in sorted((Path(run_dir) / "logs").glob("*/node*.log")):
        if match := _NAME.fullmatch(path.name):
            log = LogFile(path.parent.name, int(match[1]), None if match[2] is None else int(match[2]), path)
            wanted = ((stage, log.stage), (node, log.node), (rank, log.rank))
            if all(asked is None or asked == has for asked, has in wanted):
                found.append(log)
    return found


@dataclass
class Follower:
    """Reads what is appended to one log; a line counts when it is whole."""

    file: LogFile
    offset: int = 0
    _rest: bytes = b""
    _stamp: str = field(default="")

    def poll(self) -> list[Line]:
        """Lines since the last call."""
        try:
            with open(self.file.path, "rb") as log:
                log.seek(self.offset)
                data = log.read()
        except FileNotFoundError:
            return []
        self.offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [self._line(line.decode("utf-8", errors="replace")) for line in lines]

    def _line(self, text: str) -> Line:
        if _STAMP.match(text):
            self._stamp, text = text[: STAMP_LENGTH - 1], text[STAMP_LENGTH:]
        return Line(self._stamp, self.file, text)


def merge(lines: Iterable[Line]) -> list[Line]:
    """By time; lines of one log keep their order."""
    return sorted(lines, key=lambda line: line.stamp)


def render(lines: Iterable[Line], *, label: bool) -> Iterator[str]:
    for line in lines:
        yield f"{line.stamp[11:]} {f'{line.file.label} ' if label else ''}{line.text}"
