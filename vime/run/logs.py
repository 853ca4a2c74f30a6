"""Find, follow and merge a run's logs by the time stamp of each line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vime.run.plan import Plan

TRAIN = "train"
"""Stage in whose log Ray collects the output of the trainer's ranks."""
_NAME = re.compile(r"node(\d+)(?:\.rank(\d+))?\.log")
_ENGINE = re.compile(r"engine-(\d+)-node(\d+)\.log")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ")
STAMP_LENGTH = 24
_VLLM = re.compile(r"(?:\(\S+ pid=\d+\) )?(?:DEBUG|INFO|WARNING|ERROR) (\d\d-\d\d \d\d:\d\d:\d\d) ")
_ACTOR = re.compile(r"\(rank (\d+) on node (\d+) pid=\d+(?:, ip=\S+)?\) ?")
"""Prefix that Ray adds to lines of vime.train.actors.RankActor."""


@dataclass(frozen=True)
class LogFile:
    """Log of a stage's task, of an engine, or of one trainer rank (its lines in the log of training)."""

    stage: str
    node: int
    rank: int | None
    """Rank of the task, or index of the engine in the run."""
    path: Path

    @property
    def label(self) -> str:
        return f"{self.stage}/node{self.node:02d}" + (f".rank{self.rank}" if self.rank is not None else "")


@dataclass(frozen=True)
class Line:
    """One line of a log."""

    stamp: str
    """`2026-01-31 12:00:00.123`; a line without one gets that of the previous line."""
    file: LogFile
    text: str


@dataclass(frozen=True)
class Wanted:
    """Selection of lines; None selects any value."""

    stage: str | None = None
    node: int | None = None
    rank: int | None = None
    single_ranks: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Rank of a stage's only task on a node: log names contain ranks only if tasks share a node."""

    def takes(self, log: LogFile) -> bool:
        rank = self.single_ranks.get((log.stage, log.node)) if log.rank is None else log.rank
        asked = ((self.stage, log.stage), (self.node, log.node), (self.rank, rank))
        return all(wanted is None or wanted == has for wanted, has in asked)

    def takes_all(self, log: LogFile) -> bool:
        """True if every line of the file is selected."""
        return self.takes(log) and not (log.stage == TRAIN and (self.node is not None or self.rank is not None))

    def may_hold(self, log: LogFile) -> bool:
        """True if the file may hold a selected line."""
        return self.takes(log) or (log.stage == TRAIN and self.stage in (None, TRAIN))


def single_ranks(plan: Plan) -> dict[tuple[str, int], int]:
    """Rank of every task that is alone on its node, by stage and node; without the driver of training."""
    stages = [stage for stage in plan.stages if stage.tasks_per_node == 1 and stage.name != TRAIN]
    return {(stage.name, node): rank for stage in stages for rank, node in enumerate(stage.nodes)}


def find_logs(
    run_dir: str | Path, *, stage: str | None = None, node: int | None = None, rank: int | None = None
) -> list[LogFile]:
    """Matching log files, ordered by stage, node and rank."""
    wanted = Wanted(stage, node, rank)
    return [log for log in all_logs(run_dir) if wanted.takes(log)]


def all_logs(run_dir: str | Path) -> list[LogFile]:
    """All logs of tasks and engines, ordered by stage, node and rank."""
    found = []
    for path in sorted((Path(run_dir) / "logs").glob("*/*.log")):
        if match := _NAME.fullmatch(path.name):
            found.append(LogFile(path.parent.name, int(match[1]), None if match[2] is None else int(match[2]), path))
        elif match := _ENGINE.fullmatch(path.name):
            found.append(LogFile(path.parent.name, int(match[2]), int(match[1]), path))
    return found


def tail_offset(path: Path, lines: int) -> int:
    """Offset in bytes of the last `lines` lines, found without reading the whole file."""
    block = 64 * 1024
    with open(path, "rb") as log:
        place = log.seek(0, os.SEEK_END)
        # Counts newlines: one ends each line, and one more precedes the first of them.
        missing = lines + 1
        while place > 0:
            start = max(0, place - block)
            log.seek(start)
            data = log.read(place - start)
            found = data.count(b"\n")
            if found >= missing:
                end = len(data)
                for _ in range(missing):
                    end = data.rindex(b"\n", 0, end)
                return start + end + 1
            missing -= found
            place = start
    return 0


@dataclass
class Follower:
    """Reads lines appended to one log, complete ones only."""

    file: LogFile
    offset: int = 0
    _rest: bytes = b""
    _stamp: str = field(default="")

    def poll(self) -> list[Line]:
        """New complete lines since the last call."""
        try:
            with open(self.file.path, "rb") as log:
                if log.seek(0, os.SEEK_END) < self.offset:
                    self.offset, self._rest = 0, b""  # it began anew (vime.system.bounded_log)
                log.seek(self.offset)
                data = log.read()
        except FileNotFoundError:
            return []
        self.offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return _stamped([self._line(line.decode("utf-8", errors="replace")) for line in lines])

    def _line(self, text: str) -> Line:
        if _STAMP.match(text):
            self._stamp, text = text[: STAMP_LENGTH - 1], text[STAMP_LENGTH:]
        elif match := _VLLM.match(text):
            # vLLM writes no year.
            self._stamp = f"{time.localtime().tm_year}-{match[1]}.000"
        if self.file.stage == TRAIN and (match := _ACTOR.match(text)):
            actor = LogFile(TRAIN, int(match[2]), int(match[1]), self.file.path)
            return Line(self._stamp, actor, text[match.end() :])
        return Line(self._stamp, self.file, text)


def _stamped(lines: list[Line]) -> list[Line]:
    """Give the lines before the first time stamp that stamp."""
    first = next((line.stamp for line in lines if line.stamp), "")
    return [line if line.stamp else replace(line, stamp=first) for line in lines]


def merge(lines: Iterable[Line]) -> list[Line]:
    """Sort by time; lines of one log keep their order, also where its clock was set back."""
    newest: dict[Path, str] = {}
    dated = []
    for line in lines:
        newest[line.file.path] = max(newest.get(line.file.path, ""), line.stamp)
        dated.append((newest[line.file.path], line))
    return [line for _, line in sorted(dated, key=lambda item: item[0])]
