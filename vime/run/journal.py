"""Journal of a run, `events.jsonl`: its events in order. The controller writes it, every command reads it."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vime.system.json_lines import LineFile, Lines
from vime.system.redact import redact, redacted

EVENTS_FILE = "events.jsonl"
RESERVE_FILE, RESERVE_BYTES = ".reserve", 256 * 1024

Kind = Literal[
    "run-start",
    "stage-start",
    "stage-ready",
    "stage-skip",
    "stage-end",
    "preflight",
    "binding",
    "signal",
    "checkpoint-request",
    "checkpoint",
    "evaluation",
    "recovery",
    "requeue",
    "job-end",
    "hold",
    "exclude",
    "run-end",
]


class Event(BaseModel):
    """One line of the journal."""

    model_config = ConfigDict(frozen=True)

    time: float = Field(default_factory=time.time)
    """Unix seconds."""
    kind: Kind
    stage: str | None = None
    node: str | None = None
    """Host name."""
    rank: int | None = None
    """Rank of the task in its stage."""
    text: str = ""
    """One line for a person."""
    data: dict[str, Any] = Field(default_factory=dict)


class Journal:
    """The only writer. Each line is one write to a file opened for appending; with `sync` it survives a crash.

    A full disk is met by a reserve of blocks; events that still cannot be written wait in memory. `write` never raises.
    """

    def __init__(self, run_dir: str | os.PathLike[str]) -> None:
        """Raises OSError if the journal cannot be opened."""
        self._reserve = Path(run_dir) / RESERVE_FILE
        self._waiting = b""
        self.error: OSError | None = None
        """Error that keeps events in memory, or None."""
        self._file = LineFile(Path(run_dir) / EVENTS_FILE)
        self._keep_reserve()

    def write(self, kind: Kind, text: str = "", *, sync: bool = True, **fields: Any) -> Event:
        """Append an event; `fields` are stage, node, rank and data of Event."""
        # Redact secrets of log tails and errors: reports, status and the job's comment show events.
        fields["data"] = redacted(fields.get("data", {}))
        event = Event(kind=kind, text=redact(text), **fields)
        self._waiting += event.model_dump_json(exclude_defaults=True).encode() + b"\n"
        self.flush(sync=sync)
        return event

    def flush(self, *, sync: bool = True) -> bool:
        """Write the waiting events; True if none is left."""
        try:
            try:
                self._write_waiting()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._reserve.exists():
                    raise
                self._reserve.unlink()
                self._write_waiting()
            if sync:
                self._file.sync()
        except OSError as error:
            self.error = error
            return False
        self.error = None
        return True

    def close(self) -> None:
        self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.append(self._waiting) :]

    def _keep_reserve(self) -> None:
        """Allocate blocks ahead, so that the final event has room on a full disk."""
        if not self._reserve.exists():
            descriptor = os.open(self._reserve, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, bytes(RESERVE_BYTES))
            finally:
                os.close(descriptor)


def read_events(run_dir: str | os.PathLike[str], damage: Counter[str] | None = None) -> list[Event]:
    """All events of a run, oldest first. Invalid lines are skipped, and counted in `damage` under the file's name."""
    lines = Lines(Path(run_dir) / EVENTS_FILE)
    events = list(lines.read(Event.model_validate))
    if damage is not None:
        damage[EVENTS_FILE] += lines.skipped
    return events


def last_start(events: list[Event]) -> list[Event]:
    """Events since the run's last start, requeue or recovery; in a chain, since each job's last one."""
    before: list[Event] = []
    starts: dict[int, list[Event]] = {}
    current = before
    for event in events:
        if event.kind == "run-start":
            # Restarting a link invalidates the later links' events.
            index = event.data.get("link_index", 0)
            starts = {link: kept for link, kept in starts.items() if link < index}
            current = starts[index] = []
        current.append(event)
    return [event for index in sorted(starts) for event in starts[index]] if starts else before
