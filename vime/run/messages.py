"""Messages from a task to the controller: JSON, as framed lines on the task's standard output.

srun forwards that output to the controller at once, while a file on a shared file system may show up half a minute
later. Slurm forwards output in pieces of up to 1 KiB that mix between tasks, so a message is split into shorter frames.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal

FRAME_CHARACTERS = 800
MARK = "~vime"
REPORT_FD = "VIME_REPORT_FD"
"""Environment variable: descriptor on which a stage's command reports to its task."""

Kind = Literal["start", "ready", "waiting", "result", "failure", "alive", "evaluate", "exit"]


@dataclass(frozen=True)
class Report:
    """One message of one task.

    `start`: the task runs (host, pid, step). `waiting`: a service is not ready (missing). `ready`: a service serves.
    `result`: what the command found (preflight). `failure`: why a service or the driver of training ends (cause, text,
    nodes, rank). `alive`: the driver of training answers, every few seconds. `evaluate`: an HF folder waits for a job
    that evaluates it (rollout_id, weights), or there is none (rollout_id, left_out). `exit`: the command ended (code,
    signal, stopped, tail).
    """

    rank: int
    kind: Kind
    data: dict[str, Any] = field(default_factory=dict)
    arrived: float = field(default_factory=time.time, compare=False)
    """Unix time of arrival at this process."""


def encode(report: Report) -> bytes:
    """Frames of a report: ASCII lines `~vime RANK MORE PIECE`."""
    text = json.dumps([report.kind, report.data], separators=(",", ":"))
    pieces = [text[i : i + FRAME_CHARACTERS] for i in range(0, len(text), FRAME_CHARACTERS)]
    last = len(pieces) - 1
    return "".join(f"{MARK} {report.rank} {int(i < last)} {piece}\n" for i, piece in enumerate(pieces)).encode("ascii")


class Assembler:
    """Turns the output of all tasks of a step into reports, and keeps the other lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._pieces: dict[int, str] = {}
        self.other: list[str] = []

    def feed(self, data: bytes) -> list[Report]:
        """Reports completed by these bytes, in order."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = (self._line(line.decode("utf-8", errors="replace")) for line in lines)
        return [report for report in found if report is not None]

    def _line(self, line: str) -> Report | None:
        mark, _, content = line.partition(" ")
        try:
            if mark != MARK:
                raise ValueError
            rank_text, more, piece = content.split(" ", 2)
            rank = int(rank_text)
            whole = self._pieces.pop(rank, "") + piece
            if more == "1":
                self._pieces[rank] = whole
                return None
            kind, data = json.loads(whole)
            return Report(rank, kind, data)
        except ValueError:
            self.other = [*self.other, line][-50:]
            return None


def report(kind: Kind, **data: Any) -> None:
    """Send a message from a stage's command through its task to the controller; no-op without a task."""
    descriptor = os.environ.get(REPORT_FD)
    if descriptor is not None:
        os.write(int(descriptor), json.dumps([kind, data], separators=(",", ":")).encode("ascii") + b"\n")
