"""Runs one command and controls all its descendants: none outlives the supervisor.

Linux only: the supervisor is the subreaper of orphans below it, so a detached daemon stays its descendant.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vime.system.bounded_log import BoundedLog
from vime.system.limits import raise_soft_limits
from vime.system.processes import adopt_orphans, descendants, kill_tree, signal_on_parent_end

TAIL_LINES = 30
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LONGEST_LINE = 64 * 1024


@dataclass(frozen=True)
class Exit:
    """End of a command."""

    code: int
    """Exit code; 128 + signal if a signal ended the command."""
    signal: int | None
    stopped: bool
    """True if the supervisor was asked to end the command."""
    tail: tuple[str, ...]
    """Last lines of the command's output."""

    @property
    def meaning(self) -> str:
        """`exit code 3` or `SIGKILL`."""
        return f"exit code {self.code}" if self.signal is None else signal.Signals(self.signal).name


class Supervisor:
    """One command and its descendants. `run` is called once, in the main thread, before any other thread starts."""

    def __init__(
        self,
        argv: Sequence[str],
        env: dict[str, str],
        log: Path,
        *,
        on_report: Callable[[bytes], None],
        report_variable: str,
        grace_s: float = 6.0,
    ) -> None:
        self._argv, self._env, self._log = argv, env, log
        self._on_report, self._report_variable = on_report, report_variable
        self._grace_s = grace_s
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def run(self) -> Exit:
        """Run the command to its end, or end it on TERM, INT, HUP or the death of the parent."""
        raise_soft_limits()
        adopt_orphans()
        watched = {*STOP_SIGNALS, signal.SIGCHLD}
        old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        parent = os.getppid()
        signal_on_parent_end(signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
        output, reports = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        child = self._fork(output[1], reports[1], old_mask)
        os.close(output[1])
        os.close(reports[1])
        pumps = [
            threading.Thread(target=self._pump_output, args=(output[0],), daemon=True),
            threading.Thread(target=self._pump_reports, args=(reports[0],), daemon=True),
        ]
        for pump in pumps:
            pump.start()
        status, stopped = self._wait(child, watched)
        self._clear(watched)
        for pump in pumps:
            pump.join(timeout=5)
        code = os.waitstatus_to_exitcode(status)
        return Exit(
            code=code if code >= 0 else 128 - code,
            signal=-code if code < 0 else None,
            stopped=stopped,
            tail=tuple(self._tail),
        )

    def _fork(self, output: int, reports: int, mask: set[signal.Signals] | set[int]) -> int:
        child = os.fork()
        if child:
            return child
        try:
            signal_on_parent_end(signal.SIGKILL)
            os.setsid()
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.set_inheritable(reports, True)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execvpe(self._argv[0], list(self._argv), {**self._env, self._report_variable: str(reports)})
        except OSError as error:
            os.write(2, f"error: cannot start {self._argv[0]}: {error.strerror}\n".encode())
        finally:
            os._exit(127)

    def _wait(self, child: int, watched: set[signal.Signals]) -> tuple[int, bool]:
        """Wait status of the child, and True if the supervisor was asked to end it."""
        deadline: float | None = None
        while True:
            while (ended := _reap()) is not None:
                if ended[0] == child:
                    return ended[1], deadline is not None
            left = 3600.0 if deadline is None else max(0.0, deadline - time.monotonic())
            arrived = signal.sigtimedwait(watched, left)
            if arrived is None and deadline is not None:
                kill_tree(os.getpid(), signal.SIGKILL)
                deadline = time.monotonic() + 1.0
            elif arrived is not None and arrived.si_signo in STOP_SIGNALS and deadline is None:
                deadline = time.monotonic() + self._grace_s
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)

    def _clear(self, watched: set[signal.Signals]) -> None:
        """End the command's remaining descendants: TERM, KILL after two seconds, until none is left."""
        begin, killed = time.monotonic(), False
        if kill_tree(os.getpid(), signal.SIGTERM) == 0:
            return
        while True:
            while _reap() is not None:
                pass
            late = time.monotonic() - begin > 2.0
            left = kill_tree(os.getpid(), signal.SIGKILL) if late else len(descendants(os.getpid()))
            if not left:
                return
            if killed and time.monotonic() - begin > 10.0:
                print(f"error: {left} processes do not end after SIGKILL", file=sys.stderr)
                return
            killed = late
            signal.sigtimedwait(watched, 0.2)

    def _pump_output(self, descriptor: int) -> None:
        """Copy the command's output to the log with a time before each line, so that logs of nodes can be merged."""
        log = _Log(self._log)
        for line in _lines(descriptor):
            log.write(line)
            self._tail.append(line.decode("utf-8", errors="replace"))
        log.close()

    def _pump_reports(self, descriptor: int) -> None:
        for line in _lines(descriptor):
            self._on_report(line)


class _Log:
    """A log that loses lines while the file system is full or read-only, but never stops the command."""

    def __init__(self, path: Path) -> None:
        self._file = BoundedLog(path)
        self._lost = 0

    def write(self, line: bytes) -> None:
        try:
            if self._lost:
                self._file.write(_stamped(b"(%d lines could not be written here)" % self._lost))
                self._lost = 0
            self._file.write(_stamped(line))
        except OSError:
            # The exit report's tail still has the last of them.
            self._lost += 1

    def close(self) -> None:
        self._file.close()


def _stamped(line: bytes) -> bytes:
    now = time.time()
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now)) + f".{int(now % 1 * 1000):03d} "
    return stamp.encode() + line + b"\n"


def _reap() -> tuple[int, int] | None:
    """(pid, wait status) of a child that has ended; None without one."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _lines(descriptor: int):
    """Yield lines until every writer has closed; split overlong lines."""
    rest = b""
    while data := os.read(descriptor, 65536):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = b""
    if rest:
        yield rest
    os.close(descriptor)
