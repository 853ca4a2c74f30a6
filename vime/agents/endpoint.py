"""An endpoint of this node for programs that are agents themselves: they speak with a model, a session keeps the ids.

It listens on loopback or on a unix socket, and answers only to a conversation's own secret. A client sends the whole
history with every request; what goes on from a known line is given to that line's session, and all else (a sub-agent, a
compacted history, a second try) begins a branch of the conversation.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from vime.agents.protocols import Answered, AnthropicMessages, Ask, OpenAIChat, Protocol, for_template, same_message
from vime.errors import BadInput
from vime.rollout.session import BudgetSpent, ConversationOver
from vime.system.private import private_folder

MOST_BYTES = 64 << 20
"""Bytes of a request."""
MOST_BRANCHES = 64
"""Branches of a conversation besides its main line."""


@dataclass
class _Line:
    """A line of the conversation: its session, and the messages that a client knows of it."""

    session: Any
    messages: list[dict[str, Any]]
    busy: bool = False

    def goes_on_in(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the messages are this line's and more, none of which the model should have said."""
        known = len(self.messages)
        more = messages[known:]
        return (
            not self.busy
            and bool(more)
            and all(same_message(mine, theirs) for mine, theirs in zip(self.messages, messages, strict=False))
            and all(message["role"] != "assistant" for message in more)
        )


@dataclass
class Endpoint:
    """Where an agent's program reaches the model of one conversation."""

    url: str
    """Without a path; empty for a unix socket."""
    key: str = field(repr=False)
    socket: str = ""

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which the usual clients find it."""
        return {
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": self.key,
            "ANTHROPIC_BASE_URL": self.url,
            "ANTHROPIC_API_KEY": self.key,
        }


@contextlib.asynccontextmanager
async def endpoint(session: Any, *, socket: str | os.PathLike[str] | None = None) -> AsyncIterator[Endpoint]:
    """Serve a conversation until the block ends; on loopback, or on a unix socket in a folder of the user's own.

    `session` is that of a function: `async with endpoint(session) as model: …`.
    """
    key = secrets.token_urlsafe(32)
    conversation = _Conversation(session, hashlib.sha256(key.encode()).digest())
    app = web.Application(client_max_size=MOST_BYTES)
    for path, protocol in (("/v1/chat/completions", OpenAIChat), ("/v1/messages", AnthropicMessages)):
        app.router.add_post(path, conversation.route(protocol))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        if socket is None:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield Endpoint(f"http://127.0.0.1:{runner.addresses[0][1]}", key)
        else:
            private_folder(Path(socket).parent)
            await web.UnixSite(runner, str(socket)).start()
            os.chmod(socket, 0o600)
            yield Endpoint("http://localhost", key, str(socket))
    finally:
        await runner.cleanup()


class _Conversation:
    """The lines of one conversation behind an endpoint."""

    def __init__(self, session: Any, digest: bytes) -> None:
        self._session, self._digest = session, digest
        self._lines: list[_Line] = []

    def route(self, protocol: type[Protocol]) -> Callable[[web.Request], Any]:
        """Handler of a protocol's requests."""

        async def handle(request: web.Request) -> web.StreamResponse:
            if not self._knows(request):
                return web.json_response(protocol.error("this needs the key of its conversation", "no_key"), status=401)
            try:
                body = await request.json()
                if not isinstance(body, dict):
                    raise BadInput("the request is no JSON object")
                ask = protocol.read(body)
                answered = await self._answer(ask)
            except (BadInput, ValueError, KeyError, TypeError, AttributeError) as error:
                return web.json_response(protocol.error(_line(error), "bad_request"), status=400)
            except ConversationOver as error:
                kind = f"no_{error.what}_left" if isinstance(error, BudgetSpent) else "conversation_over"
                return web.json_response(protocol.error(str(error), kind), status=400)
            if not ask.stream:
                return web.json_response(protocol.write(answered))
            return await _streamed(request, protocol, answered)

        return handle

    def _knows(self, request: web.Request) -> bool:
        given = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        return secrets.compare_digest(hashlib.sha256(given.encode()).digest(), self._digest)

    async def _answer(self, ask: Ask) -> Answered:
        """The model's next turn on the line that the messages go on, or on a new one."""
        if not ask.messages or ask.messages[-1]["role"] == "assistant":
            raise BadInput("the last message is none that the model could answer")
        line = self._line(ask)
        line.busy = True
        try:
            reply = await line.session.generate(ask.max_tokens, ask.stop)
            message = {"role": "assistant", "content": reply.text}
            if ask.tools:
                message = await line.session.message(reply, ask.tools)
        finally:
            line.busy = False
        line.messages = [*ask.messages, message]
        sample = line.session.sample
        before = len(sample.prompt_ids) + len(sample.response_ids) - len(reply.token_ids)
        return Answered(message, reply.finish, before, len(reply.token_ids))

    def _line(self, ask: Ask) -> _Line:
        known = [line for line in self._lines if line.goes_on_in(ask.messages)]
        if known:
            line = max(known, key=lambda line: len(line.messages))
            line.session.give(for_template(ask.messages)[len(line.messages) :])
            return line
        if len(self._lines) > MOST_BRANCHES:
            raise BadInput(f"the conversation has {MOST_BRANCHES} branches already")
        messages = for_template(ask.messages)
        if not self._lines:
            session = self._session
            session.start(messages, ask.tools)
        else:
            session = self._session.branch(messages, ask.tools)
        line = _Line(session, [])
        self._lines.append(line)
        return line


async def _streamed(request: web.Request, protocol: type[Protocol], answered: Answered) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    for event in protocol.events(answered):
        await response.write(event.encode())
    await response.write_eof()
    return response


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
