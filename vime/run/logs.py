"""The logs of a run: finding, following and merging them by the time stamp of each line."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vime.run.plan import Plan

TRAIN = "train"
"""The stage in whose log Ray collects what the trainer's ranks say."""
_NAME = re.compile(r"node(\d+)(?:\.rank(\d+))?\.log")
_ENGINE = re.compile(r"engine-(\d+)-node(\d+)\.log")
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} ")
STAMP_LENGTH = 24
_VLLM = re.compile(r"(?:\(\S+ pid=\d+\) )?(?:DEBUG|INFO|WARNING|ERROR) (\d\d-\d\d \d\d:\d\d:\d\d) ")
_ACTOR = re.compile(r"\(rank (\d+) on node (\d+) pid=\d+(?:, ip=\S+)?\) ?")
"""Prefix that Ray gives to lines of vime.train.actors.RankActor."""


@dataclass(frozen=True)
class LogFile:
    """One task's log: of a stage's task, of an engine, or what one trainer rank says in the log of training."""

    stage: str
    node: int
    rank: int | None
    """Rank of the task; of an engine, its index in the run."""
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


@dataclass(frozen=True)
class Wanted:
    """Selection of lines; None selects any value."""

    stage: str | None = None
    node: int | None = None
    rank: int | None = None
    single_ranks: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Rank of the one task of a stage on a node: names of logs tell ranks only where tasks share a node."""

    def takes(self, log: LogFile) -> bool:
        rank = self.single_ranks.get((log.stage, log.node)) if log.rank is None else log.rank
        asked = ((self.stage, log.stage), (self.node, log.node), (self.rank, rank))
        return all(wanted is None or wanted == has for wanted, has in asked)

    def takes_all(self, log: LogFile) -> bool:
        """True where every line of the file is selected."""
        return self.takes(log) and not (log.stage == TRAIN and (self.node is not None or self.rank is not None))

    def may_hold(self, log: LogFile) -> bool:
        """True where the file may hold a selected line."""
        return self.takes(log) or (log.stage == TRAIN and self.stage in (None, TRAIN))


def single_ranks(plan: Plan) -> dict[tuple[str, int], int]:
    """Rank of every task that has its node for itself, by stage and node; the driver of training is none."""
    stages = [stage for stage in plan.stages if stage.tasks_per_node == 1 and stage.name != TRAIN]
    return {(stage.name, node): rank for stage in stages for rank, node in enumerate(stage.nodes)}


def find_logs(
    run_dir: str | Path, *, stage: str | None = None, node: int | None = None, rank: int | None = None
) -> list[LogFile]:
    """The log files that match, by stage, node and rank."""
    wanted = Wanted(stage, node, rank)
    return [log for log in all_logs(run_dir) if wanted.takes(log)]


def all_logs(run_dir: str | Path) -> list[LogFile]:
    """Every log of a task or an engine, by stage, node and rank."""
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
        # A line counts by the newline at its end; one more newline stands before the first of them.
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
    """Gives lines before the first time stamp that stamp."""
    first = next((line.stamp for line in lines if line.stamp), "")
    return [line if line.stamp else replace(line, stamp=first) for line in lines]


def merge(lines: Iterable[Line]) -> list[Line]:
    """By time; lines of one log keep their order."""
    return sorted(lines, key=lambda line: line.stamp)
