"""Signals as events of the controller's loop: handlers only record them, the loop acts on them."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

WATCHED = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Context manager for the main thread; restores the previous handlers at its end."""

    def __init__(self) -> None:
        self.arrived: list[signal.Signals] = []
        self._old: dict[signal.Signals, Any] = {}
        self._wake, self._woken = -1, -1

    def __enter__(self) -> Signals:
        self._wake, self._woken = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in WATCHED:
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._woken)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.arrived.append(signal.Signals(number))

    def take(self) -> signal.Signals | None:
        """Strongest signal since the last call, or None: one that ends the run before one that warns."""
        arrived, self.arrived = self.arrived, []
        ending = [number for number in arrived if number != signal.SIGUSR2]
        return (ending or arrived or [None])[0]

    def wait(self, descriptors: Iterable[int], seconds: float) -> None:
        """Wait until a signal arrives, a descriptor becomes readable, or the time is over."""
        # Not select, which takes no descriptor from 1024 on.
        waiting = select.poll()
        for descriptor in (self._wake, *descriptors):
            waiting.register(descriptor, select.POLLIN)
        if any(descriptor == self._wake for descriptor, _ in waiting.poll(1000 * seconds)):
            os.read(self._wake, 4096)
