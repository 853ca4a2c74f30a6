"""Worker processes that exchange frames over pipes: requests are pickled, replies are JSON, which cannot run code."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import sys
from typing import Any, Self

from vime.errors import BadInput, DeadlineExceeded, VimeError
from vime.rewards.worker import LENGTH

START_SECONDS = 120.0


class WorkerProcess:
    """One worker. A frame is its length (`LENGTH`) and its bytes, in both directions."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        self._process = process
        self.ready = ready
        """First frame of the worker, once it has imported what it runs."""

    @classmethod
    async def launch(cls, module: str, *words: str, name: str) -> Self:
        """A worker `python -m module PARENT_PID WORDS` that is ready. `name` appears in messages.

        Raises BadInput if the worker refuses what it shall run, DeadlineExceeded, or VimeError if it exits.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, str(os.getpid()), *words),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        worker = cls(process, {})
        try:
            async with asyncio.timeout(START_SECONDS):
                worker.ready = await worker.read()
            if "bad_input" in worker.ready:
                raise BadInput(worker.ready["bad_input"])
        except TimeoutError:
            await worker.kill()
            raise DeadlineExceeded(f"{name} was not ready within {START_SECONDS:.0f} s") from None
        except asyncio.IncompleteReadError:
            code = await process.wait()
            raise VimeError(f"{name} exited with {code} at its start; its last words are above") from None
        except BaseException:
            await worker.kill()
            raise
        return worker

    @property
    def runs(self) -> bool:
        """False once the process is known to have ended."""
        return self._process.returncode is None

    def write(self, content: Any) -> None:
        """Queue a request; `drain` waits until the pipe has room again."""
        assert self._process.stdin is not None
        body = pickle.dumps(content)
        self._process.stdin.write(LENGTH.pack(len(body)) + body)

    async def drain(self) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.drain()

    async def read(self) -> dict[str, Any]:
        """Next reply. Raises asyncio.IncompleteReadError when the process has ended."""
        assert self._process.stdout is not None
        head = await self._process.stdout.readexactly(LENGTH.size)
        return json.loads(await self._process.stdout.readexactly(LENGTH.unpack(head)[0]))

    def strike(self) -> None:
        """Send KILL and return at once; readers see the end of the stream."""
        with contextlib.suppress(ProcessLookupError):
            if self.runs:
                self._process.kill()

    async def kill(self) -> None:
        """Send KILL and wait for the end."""
        self.strike()
        await self._process.wait()


async def launch_all(size: int, module: str, *words: str, name: str) -> list[WorkerProcess]:
    """`size` workers, all ready. If one fails to start, none is left."""
    tasks = [asyncio.create_task(WorkerProcess.launch(module, *words, name=name)) for _ in range(size)]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(worker.kill() for worker in ended if isinstance(worker, WorkerProcess)))
        raise
