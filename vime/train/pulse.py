"""Signs of life of the trainer's ranks: a thread of each tells the driver what its training thread does.

A process that is stopped, or whose node hangs, gives no sign; a collective operation that does not end stops the
progress of every rank. The driver finds both, has the ranks write their stacks into the log, and ends training.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

from vime.errors import Cause, VimeError
from vime.run.plan import Binding, Plan
from vime.system.progress import Progress
from vime.system.store_server import StoreServer, listen

BEAT_S = 5.0
"""Interval between two signs of life."""
STACKS_S = 2 * BEAT_S + 3
"""Time for the ranks to hear that they shall write their stacks, and for the log to take them."""
_STACKS = "stacks"
_PATIENT = ("setup", "save", "poll_save", "finish_save")
"""Calls that read or write a checkpoint without a mark between: their own deadlines know its size."""


@dataclass(frozen=True)
class Beat:
    """One sign of life of a rank."""

    number: int
    phase: str
    """Empty between calls."""
    marks: int
    """How often the training thread has come further."""
    still_s: float
    """Seconds since then."""
    place: str
    """Where the thread stands in the code."""
    waits: bool
    """Whether it waits there for other ranks."""


@dataclass(frozen=True)
class Seen:
    """The newest beat of a rank, and how long ago it came."""

    beat: Beat
    age_s: float


class RankStuck(VimeError):
    """A rank gives no sign of life, or no rank makes progress."""

    cause = Cause.CRASH

    def __init__(self, text: str, rank: int | None, node: int | None) -> None:
        super().__init__(text)
        self.rank, self.node = rank, node


def judge(seen: Mapping[int, Seen], *, silent_s: float, stuck_s: float) -> tuple[int | None, str] | None:
    """The rank at fault (None: any of them) and what is wrong; None while all is well. Pure.

    At fault is a rank without a sign of life for `silent_s`. Where every rank in a call has stood still for `stuck_s`,
    it is the one that came least far, or the only one that does not wait for others.
    """
    silent = [rank for rank, each in seen.items() if each.age_s > silent_s]
    if silent:
        # The others may have been silent for the same reason, as after a break of the driver's own network.
        rank = max(silent, key=lambda each: seen[each].age_s)
        last = seen[rank]
        more = f", and {len(silent) - 1} more ranks" if len(silent) > 1 else ""
        return rank, (
            f"gave no sign of life for {last.age_s:.0f} s in phase {_words(last.beat)}{more}: "
            "its process is stopped, or its node hangs"
        )
    active = {rank: each.beat for rank, each in seen.items() if each.beat.phase}
    still = min((beat.still_s + seen[rank].age_s for rank, beat in active.items()), default=0.0)
    if still <= stuck_s or any(map(_patient, active.values())):
        return None
    fault = _culprit(active)
    first = active[min(active) if fault is None else fault]
    where = f"no rank made progress for {still:.0f} s in phase {_words(first)}, standing at {first.place}"
    return fault, where if fault is not None else f"{where}: a collective operation does not end"


def _culprit(beats: Mapping[int, Beat]) -> int | None:
    behind = _least([(beat.marks, rank) for rank, beat in beats.items()])
    if behind is not None:
        return behind
    busy = [rank for rank, beat in beats.items() if not beat.waits]
    return busy[0] if len(busy) == 1 and len(beats) > 1 else None


def _least(marks: Sequence[tuple[int, int]]) -> int | None:
    """The rank with fewer marks than all others."""
    lowest = min(marks)[0]
    found = [rank for count, rank in marks if count == lowest]
    return found[0] if len(found) == 1 < len(marks) else None


def _patient(beat: Beat) -> bool:
    return beat.phase.split("/")[0] in _PATIENT


def _words(beat: Beat) -> str:
    return beat.phase or "waiting for the driver"


# -- the driver's side --


class Pulse:
    """Takes the ranks' signs of life, at a free port of the driver's node."""

    def __init__(self, plan: Plan, binding: Binding, key: bytes, *, silent_s: float, stuck_s: float) -> None:
        self._plan, self._limits = plan, {"silent_s": silent_s, "stuck_s": stuck_s}
        listener = listen(binding.nodes[0].address, 0)
        self.place: tuple[str, int] = listener.getsockname()[:2]
        self._server = StoreServer(listener, key)
        self._seen: dict[int, tuple[Beat, float]] = {}

    async def watch(self) -> None:
        """Raise RankStuck when training hangs; never returns."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(BEAT_S)
            own = time.monotonic() - looked - BEAT_S
            looked += BEAT_S + own
            found = judge(self._look(own), **self._limits)
            if found is None:
                continue
            rank, text = found
            who = "training hangs" if rank is None else f"rank {rank}"
            print(f"error: {who}: {text}; stacks of the ranks that answer follow", file=sys.stderr, flush=True)
            self._server.write(_STACKS, b"1")
            await asyncio.sleep(STACKS_S)
            node = None if rank is None else self._plan.trainer_ranks[rank].node
            raise RankStuck(f"{who}: {text}", rank, node)

    def close(self) -> None:
        self._server.close()

    def _look(self, own_s: float) -> dict[int, Seen]:
        """The ranks' beats. A pause of the driver itself, in seconds, does not count as theirs."""
        now = time.monotonic()
        self._seen = {rank: (beat, came + own_s) for rank, (beat, came) in self._seen.items()}
        for rank in range(len(self._plan.trainer_ranks)):
            content = self._server.read(_beat_of(rank))
            if content is None:
                continue
            beat = Beat(**json.loads(content))
            if rank not in self._seen or self._seen[rank][0].number != beat.number:
                self._seen[rank] = (beat, now)
        return {rank: Seen(beat, now - came) for rank, (beat, came) in self._seen.items()}


# -- a rank's side --


class Heart:
    """Tells the driver every few seconds what a rank does, from a thread of its own."""

    def __init__(self, rank: int, progress: Progress, place: tuple[str, int], key: bytes) -> None:
        self._rank, self._progress, self._place, self._key = rank, progress, place, key
        self._asked = False
        threading.Thread(target=self._run, name="heart", daemon=True).start()

    def _run(self) -> None:
        from vime.system.guarded_store import GuardedStore, StoreError

        store, number = None, 0
        while True:
            number += 1
            # A driver that is away may come back, or will have ended this process soon.
            with contextlib.suppress(StoreError):
                store = store or GuardedStore(*self._place, self._key, timedelta(seconds=BEAT_S))
                store.set(_beat_of(self._rank), json.dumps(asdict(self._beat(number))))
                if not self._asked and store.check([_STACKS]):
                    self._asked = True
                    faulthandler.dump_traceback(all_threads=True)
            time.sleep(BEAT_S)

    def _beat(self, number: int) -> Beat:
        progress = self._progress
        place, waits = progress.place() if progress.phase else ("", False)
        return Beat(number, progress.phase, progress.marks, round(progress.still_s, 1), place, waits)


def _beat_of(rank: int) -> str:
    return f"beat/{rank}"
