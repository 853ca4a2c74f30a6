"""Conversations in worker processes: a function that blocks or dies does not take the driver with it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

from vime.agents.local import Failures
from vime.errors import BadInput, VimeError
from vime.rewards.pool import default_size
from vime.rewards.process import WorkerProcess, launch_all
from vime.rollout.session import Aborted, BudgetSpent, ConversationOver, Reply, Session
from vime.samples import Sample, Status, ToolUse

NAME = "an agent's worker"
CANCEL_SECONDS = 5.0
"""Time in which a worker has to give a conversation back; then it counts as blocked and is replaced."""


class ProcessAgent:
    """Holds conversations in `size` worker processes, many in each. An async context manager; of one event loop.

    `kind` is `function` or `environment`, `target` its `package.module:name`.
    """

    def __init__(self, kind: str, target: str, size: int | None = None) -> None:
        self._target, self._size = target, size or default_size()
        self._command = ("vime.agents.worker", kind, target)
        self._workers: list[_Worker] = []
        self._starts = asyncio.Lock()
        self._alone = asyncio.Semaphore(self._size)
        self._numbers = 0
        self.failures = Failures()
        self.replaced = 0
        """Workers that died or were killed and got a successor."""

    async def __aenter__(self) -> Self:
        launched = await launch_all(self._size, *self._command, name=NAME)
        self._workers = [_Worker(process) for process in launched]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all workers."""
        workers, self._workers = self._workers, []
        await asyncio.gather(*(worker.kill() for worker in workers))

    async def __call__(self, session: Session) -> None:
        self.failures.held += 1
        try:
            async with asyncio.timeout_at(session.ends_at) as limit:
                end = await self._held(session)
        except TimeoutError:
            if not limit.expired():
                raise
            session.expire()
            return
        sample = session.sample
        sample.reward, sample.environment = end.get("reward"), end.get("environment")
        if session.over is not None:
            return
        if failure := end.get("failure"):
            self.failures.add(sample, f"{self._target} raised {failure}")
        elif end.get("status") == Status.FAILED:
            self.failures.add(sample, f"{self._target} marked it as failed")

    @property
    def tools(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools that prompts tell of; known once the workers run."""
        return self._workers[0].tools

    async def _held(self, session: Session) -> dict[str, Any]:
        """Answer of a worker at the conversation's end.

        Where its worker died it begins again in one of its own, so that only one that ends its process has failed.
        """
        try:
            return await self._in(await self._worker(), session)
        except ConnectionError:
            if session.over is not None:
                return {}
        session.restart()
        async with self._alone:
            worker = await self._started()
            self.replaced += 1
            try:
                return await self._in(worker, session)
            except ConnectionError:
                return {"failure": "nothing: its process died"}
            finally:
                await worker.kill()

    async def _in(self, worker: _Worker, session: Session) -> dict[str, Any]:
        self._numbers += 1
        return await worker.hold(self._numbers, session)

    def resumes(self, sample: Sample) -> bool:
        """Whether an aborted conversation can go on."""
        return sample.environment is not None or all(worker.goes_on for worker in self._workers)

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        return self.failures.take()

    async def _worker(self) -> _Worker:
        """The worker with the fewest conversations; dead ones are replaced first."""
        async with self._starts:
            for place, worker in enumerate(self._workers):
                if worker.dead:
                    await worker.kill()
                    self._workers[place] = await self._started()
                    self.replaced += 1
        return min(self._workers, key=lambda worker: len(worker.held))

    async def _started(self) -> _Worker:
        return _Worker(await WorkerProcess.launch(*self._command, name=NAME))


class _Held:
    """One conversation in a worker: its sessions by branch, and the end that is awaited."""

    def __init__(self, session: Session) -> None:
        self.sessions = {0: session}
        self.end: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.calls: set[asyncio.Task[None]] = set()

    def apply(self, later: list[dict[str, Any]]) -> None:
        """Apply the function's actions since its last call, in order. Raises BadInput or ConversationOver."""
        for one in later:
            session = self.sessions[one["branch"]]
            if one["do"] == "start":
                session.start(one["messages"], one["tools"])
            elif one["do"] == "give":
                session.give(one["what"])
            elif one["do"] == "branch":
                branch = session.branch(one["messages"], one["tools"])
                self.sessions[branch.sample.branch] = branch
            else:
                session.sample.tools.append(ToolUse(**one["use"]))


class _Worker:
    """A worker process and the conversations that it holds."""

    def __init__(self, process: WorkerProcess) -> None:
        self._process = process
        self.held: dict[int, _Held] = {}
        self.dead = False
        self.goes_on: bool = process.ready["goes_on"]
        self.tools: list[dict[str, Any]] = process.ready["tools"]
        self._reader = asyncio.create_task(self._listen())

    async def hold(self, number: int, session: Session) -> dict[str, Any]:
        """Hold a conversation; what the worker says at its end. Raises ConnectionError if the process dies."""
        held = self.held[number] = _Held(session)
        try:
            self._send("hold", number, session.sample)
            return await asyncio.shield(held.end)
        except asyncio.CancelledError:
            await self._give_back(number, held)
            raise
        finally:
            del self.held[number]
            for call in held.calls:
                call.cancel()

    async def kill(self) -> None:
        self.dead = True
        await self._process.kill()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def _give_back(self, number: int, held: _Held) -> None:
        """Take a conversation back from the worker, with the state that its environment had behind its last step."""
        if self.dead:
            return
        self._send("cancel", number)
        await asyncio.wait([held.end], timeout=CANCEL_SECONDS)
        if not held.end.done():
            self._process.strike()  # blocked: the reader sees its end, and the next conversation gets a new worker

    def _send(self, *content: Any) -> None:
        if self.dead:
            raise ConnectionError("the worker has ended")
        self._process.write(content)

    async def _listen(self) -> None:
        """Hand every frame to its conversation, until the process ends."""
        try:
            while True:
                frame = await self._process.read()
                held = self.held.get(frame["id"])
                if held is None:
                    continue  # given back meanwhile
                if "end" in frame:
                    self._ended(held, frame)
                else:
                    call = asyncio.create_task(self._answer(frame["id"], held, frame))
                    held.calls.add(call)
                    call.add_done_callback(held.calls.discard)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.dead = True
            for held in self.held.values():
                if not held.end.done():
                    held.end.set_exception(ConnectionError("the worker has ended"))
                    held.end.exception()  # looked at here, since a cancelled caller does not

    def _ended(self, held: _Held, frame: dict[str, Any]) -> None:
        end = frame["end"]
        try:
            held.apply(frame.get("later", []))
        except ConversationOver:
            pass  # the session holds why
        except BadInput as error:
            end = {**end, "failure": str(error)}
        if not held.end.done():
            held.end.set_result(end)

    async def _answer(self, number: int, held: _Held, frame: dict[str, Any]) -> None:
        """Do what a session's method asks for and send the answer."""
        try:
            held.apply(frame["later"])
            session = held.sessions[frame["branch"]]
            held.sessions[0].sample.environment = frame["environment"]
            content = await _done(session, frame)
        except BudgetSpent as error:
            content = {"over": "budget", "text": error.what}
        except Aborted as error:
            content = {"over": "aborted", "text": str(error)}
        except ConversationOver as error:
            content = {"over": "over", "text": str(error)}
        except VimeError as error:
            over = held.sessions[frame["branch"]].over if frame["branch"] in held.sessions else None
            content = {"refused": str(error)} if over is None else {"over": "over", "text": str(error)}
        if not self.dead:
            self._send("answer", number, frame["call"], content)


async def _done(session: Session, frame: Mapping[str, Any]) -> dict[str, Any]:
    if frame["method"] == "message":
        return {"message": await session.message(Reply(**frame["reply"]), frame["tools"])}
    reply = await session.generate(frame["max_tokens"], frame["stop"])
    sample = session.sample
    # A turn that was aborted is written again as a whole.
    turn = max(0, frame["known"]["turns"] - 1) if not sample.branch else 0
    token = min(frame["known"]["tokens"], sample.turns[turn].start) if not sample.branch else 0
    added: dict[str, Any] = {
        "prompt_ids": sample.prompt_ids if sample.data_prompt is not None else None,
        "from_turn": turn,
        "from_token": token,
        "turns": [asdict(one) for one in sample.turns[turn:]],
    }
    for name in ("response_ids", "log_probs", "weight_versions", "loss_mask"):
        added[name] = getattr(sample, name)[token:]
    return {"reply": asdict(reply), "added": added}
