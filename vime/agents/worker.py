"""Worker process that holds many conversations at once for the driver, which keeps their tokens.

Frames from the driver, which started this process, are pickles: `("hold", id, sample)`, `("answer", id, call, content)`
and `("cancel", id)`. Frames to the driver are JSON: a call of a session, or a conversation's end. A frame is a length
of four bytes, then its content. What functions print goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pickle
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import msgspec

from vime.agents.ways import Way, environment_way, function_way
from vime.errors import BadInput
from vime.rewards.worker import LENGTH, read_frame
from vime.rollout.chat import Message
from vime.rollout.session import Aborted, BudgetSpent, ConversationOver, Reply
from vime.samples import Sample, ToolUse, Turn
from vime.system.processes import end_with_parent

KINDS = {"function": function_way, "environment": environment_way}
_END_CHARACTERS = 600


class RemoteSession:
    """A session whose tokens are in the driver; the same methods as `vime.rollout.session.Session`.

    What is given goes along with the next call, so that a mistake in it shows there.
    """

    def __init__(self, wire: Conversation, sample: Sample, branch: int = 0) -> None:
        self.sample = sample
        self.over: BaseException | None = None
        self._wire, self._branch = wire, branch

    @property
    def turns(self) -> list[Turn]:
        """All turns so far, sampled and given ones."""
        return self.sample.turns

    @property
    def sampled_turns(self) -> int:
        """Turns that the model has begun."""
        return sum(turn.sampled for turn in self.turns)

    @property
    def last_reply(self) -> Reply | None:
        """The model's turn, if it is whole and nothing was given behind it."""
        turn = self.turns[-1] if self.turns else None
        if turn is None or not turn.sampled or not turn.finish:
            return None
        return Reply(self.sample.response_ids[turn.start : turn.end], turn.text, turn.finish)

    def start(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Begin with these messages instead of the data set's prompt."""
        self._check()
        self.sample.prompt = list(messages)
        self._wire.later("start", self._branch, messages=list(messages), tools=list(tools or ()))

    def give(self, what: Sequence[int] | Sequence[Message]) -> None:
        """Add token ids, or chat messages."""
        self._check()
        self._wire.later("give", self._branch, what=list(what))

    async def generate(self, max_tokens: int | None = None, stop: Sequence[str] = ()) -> Reply:
        """The model's next turn."""
        answer = await self._ask("generate", max_tokens=max_tokens, stop=list(stop))
        self._take(answer["added"])
        return Reply(**answer["reply"])

    async def message(self, reply: Reply, tools: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """A turn as a chat message."""
        return (await self._ask("message", reply=asdict(reply), tools=list(tools)))["message"]

    @contextlib.contextmanager
    def tool(self, name: str) -> Iterator[ToolUse]:
        """Measures the use of a tool."""
        use, started = ToolUse(name), time.monotonic()
        try:
            yield use
        except Exception as error:
            use.error = use.error or type(error).__name__
            raise
        finally:
            use.seconds = time.monotonic() - started
            self.sample.tools.append(use)
            self._wire.later("tool", self._branch, use=asdict(use))

    def branch(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> RemoteSession:
        """Another line of the same conversation."""
        self._check()
        sample = self.sample.without_response()
        sample.branch = self._wire.next_branch()
        self._wire.later("branch", self._branch, messages=list(messages), tools=list(tools or ()))
        return RemoteSession(self._wire, sample, sample.branch)

    def _check(self) -> None:
        if self.over is not None:
            raise self.over

    async def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        self._check()
        answer = await self._wire.call(method, self._branch, arguments)
        if "over" in answer:
            kinds = {"aborted": Aborted, "budget": BudgetSpent}
            over = self.over = kinds.get(answer["over"], ConversationOver)(answer["text"])
            raise over
        if "refused" in answer:
            raise BadInput(answer["refused"])
        return answer

    def _take(self, added: Mapping[str, Any]) -> None:
        """Append what a turn added, so that the function sees its sample as the driver does."""
        sample = self.sample
        sample.prompt_ids = added["prompt_ids"] or sample.prompt_ids
        del sample.turns[added["from_turn"] :]
        sample.turns += [Turn(**turn) for turn in added["turns"]]
        for name in ("response_ids", "log_probs", "weight_versions", "loss_mask"):
            values = getattr(sample, name)
            del values[added["from_token"] :]
            values += added[name]
        sample.response = sample.turns[-1].text


class Conversation:
    """The wire of one conversation: its calls in order, and their answers."""

    def __init__(self, number: int, send: Any, sample: Sample) -> None:
        self.number, self.sample, self.send = number, sample, send
        self._later: list[dict[str, Any]] = []
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._calls, self._branches = itertools.count(), itertools.count(1)

    def next_branch(self) -> int:
        return next(self._branches)

    def later(self, operation: str, branch: int, **arguments: Any) -> None:
        """Send with the next call."""
        self._later.append({"do": operation, "branch": branch, **arguments})

    def take_later(self) -> list[dict[str, Any]]:
        taken, self._later = self._later, []
        return taken

    async def call(self, method: str, branch: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Ask the driver."""
        call = next(self._calls)
        answer = self._waiting[call] = asyncio.get_running_loop().create_future()
        sample = self.sample
        known = {"tokens": len(sample.response_ids), "turns": len(sample.turns)}
        self.send(
            {
                "id": self.number,
                "call": call,
                "method": method,
                "branch": branch,
                "later": self.take_later(),
                "known": known,
                "environment": sample.environment,
                **arguments,
            }
        )
        try:
            return await answer
        finally:
            del self._waiting[call]

    def answered(self, call: int, content: dict[str, Any]) -> None:
        if (waiting := self._waiting.get(call)) is not None and not waiting.done():
            waiting.set_result(content)


async def hold(way: Way, wire: Conversation) -> None:
    """Hold a conversation and tell the driver how it ended."""
    failure = None
    session: Any = RemoteSession(wire, wire.sample)
    try:
        await way.hold(session)
    except (ConversationOver, asyncio.CancelledError):
        pass
    except Exception as error:  # noqa: BLE001 -- functions raise whatever they like; the driver counts it
        failure = None if session.over is not None else f"{type(error).__name__}: {error}"[:_END_CHARACTERS]
    sample = wire.sample
    end = {"failure": failure, "reward": sample.reward, "environment": sample.environment, "status": str(sample.status)}
    wire.send({"id": wire.number, "later": wire.take_later(), "end": end})


async def serve(way: Way, requests: BinaryIO, send: Any) -> None:
    """Hold what the driver sends until it closes the pipe."""
    held: dict[int, tuple[Conversation, asyncio.Task[None]]] = {}
    while (frame := await asyncio.to_thread(read_frame, requests)) is not None:
        kind, number, *rest = pickle.loads(frame)
        if kind == "hold":
            wire = Conversation(number, send, rest[0])
            held[number] = (wire, asyncio.create_task(hold(way, wire)))
            held[number][1].add_done_callback(lambda _, number=number: held.pop(number, None))
        elif number in held:
            wire, task = held[number]
            wire.answered(*rest) if kind == "answer" else task.cancel()


def main() -> None:
    end_with_parent(int(sys.argv[1]))
    kind, target = sys.argv[2:4]
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when this ends

    def send(content: dict[str, Any]) -> None:
        try:
            body = msgspec.json.encode(content)
        except TypeError as error:
            body = msgspec.json.encode({"id": content["id"], "end": {"failure": f"not plain values: {error}"}})
        replies.write(LENGTH.pack(len(body)) + body)
        replies.flush()

    try:
        way = KINDS[kind](target)
    except BadInput as error:
        send({"id": -1, "bad_input": str(error)})
        return
    send({"id": -1, "ready": os.getpid(), "tools": list(way.tools), "goes_on": way.goes_on})
    asyncio.run(serve(way, requests, send))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
