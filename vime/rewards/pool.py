"""Worker processes for reward functions and filters; a call has a time limit that a hanging function cannot escape."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from vime.errors import VimeError
from vime.rewards.process import WorkerProcess, launch_all

MODULE, NAME = "vime.rewards.worker", "a reward worker"
KILL_AFTER_SECONDS = 1.0
"""Grace beyond a call's limit, in which the worker's own alarm ends the call and the worker survives."""


class CallTimeout(VimeError):
    """The function did not return within its limit."""


class CallFailed(VimeError):
    """The function raised, or its process died."""


def default_size() -> int:
    """Workers for this machine: a quarter of its cores; engines and trainer need the others."""
    return min(16, max(2, len(os.sched_getaffinity(0)) // 4))


@dataclass
class _GroupLimit:
    """Limit on the calls of one group that run at once."""

    running: asyncio.Semaphore
    users: int = 0
    """Calls that run or wait."""


class ProcessPool:
    """`size` worker processes that have imported `targets`. An async context manager; of one event loop."""

    def __init__(self, targets: Sequence[str], size: int | None = None) -> None:
        self._targets = tuple(dict.fromkeys(targets))
        self._size = size or default_size()
        self._idle: asyncio.Queue[WorkerProcess | BaseException] = asyncio.Queue()
        self._workers: set[WorkerProcess] = set()
        self._successions: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._limits: dict[int, _GroupLimit] = {}
        self.replaced = 0
        """Workers that were killed or died and got a successor."""

    async def __aenter__(self) -> Self:
        for worker in await launch_all(self._size, MODULE, *self._targets, name=NAME):
            self._workers.add(worker)
            self._idle.put_nowait(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def call(self, target: str, argument: Any, *, limit_s: float, group: int | None = None) -> Any:
        """The function's result for the argument: a number, a boolean, or a list of them.

        Calls of one `group` take at most half of the workers, so that slow ones keep no other group waiting. The limit
        counts from when a worker has the call. Raises CallTimeout or CallFailed. A cancelled call runs on
        in its worker, which then takes the next one.
        """
        run = asyncio.create_task(self._call(target, argument, limit_s, group))
        self._running.add(run)
        run.add_done_callback(self._ended)
        return await asyncio.shield(run)

    def _ended(self, run: asyncio.Task[Any]) -> None:
        self._running.discard(run)
        if not run.cancelled():
            run.exception()  # looked at here, since a cancelled caller does not

    @contextlib.asynccontextmanager
    async def _limited(self, group: int | None) -> AsyncIterator[None]:
        """Wait until the group's limit lets another call run."""
        if group is None:
            yield
            return
        limit = self._limits.setdefault(group, _GroupLimit(asyncio.Semaphore(max(1, self._size // 2))))
        limit.users += 1
        try:
            async with limit.running:
                yield
        finally:
            limit.users -= 1
            if not limit.users:
                del self._limits[group]

    async def _call(self, target: str, argument: Any, limit_s: float, group: int | None) -> Any:
        async with self._limited(group):
            return await self._ask(target, argument, limit_s)

    async def _ask(self, target: str, argument: Any, limit_s: float) -> Any:
        worker = await self._idle.get()
        if isinstance(worker, BaseException):
            self._idle.put_nowait(worker)
            raise CallFailed(f"a reward worker died and no other could be started: {worker}")
        try:
            worker.write((target, argument, limit_s))
            async with asyncio.timeout(limit_s + KILL_AFTER_SECONDS):
                await worker.drain()
                reply = await worker.read()
        except BaseException as error:
            # Whatever the reason, a worker with half a call in it is of no use.
            if not self._closed:
                succession = asyncio.create_task(self._replace(worker))
                self._successions.add(succession)
                succession.add_done_callback(self._successions.discard)
            if isinstance(error, TimeoutError):
                raise CallTimeout(f"{target} did not return within {limit_s:g} s and was killed") from None
            if isinstance(error, (ConnectionError, asyncio.IncompleteReadError)):
                raise CallFailed(f"{target}: the process that ran it died") from None
            raise
        self._idle.put_nowait(worker)
        if "timeout" in reply:
            raise CallTimeout(f"{target} did not return within {limit_s:g} s")
        if "error" in reply:
            raise CallFailed(f"{target} raised {reply['error']}")
        return reply["value"]

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        tasks = (*self._running, *self._successions)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in self._workers))
        self._workers.clear()

    async def _replace(self, worker: WorkerProcess) -> None:
        self._workers.discard(worker)
        await worker.kill()
        self.replaced += 1
        try:
            successor = await WorkerProcess.launch(MODULE, *self._targets, name=NAME)
            self._workers.add(successor)
            self._idle.put_nowait(successor)
        except VimeError as error:
            # The next call says it: nobody waits for this task.
            self._idle.put_nowait(error)
