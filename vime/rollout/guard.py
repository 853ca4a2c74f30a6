"""Middleware that requires the run's key on every route of a vLLM server and names the server in every answer.

vLLM's own check covers only `/v1` and `/inference`, and leaves weight updates, pausing and remote calls of worker
methods open to anyone who reaches the port. The server loads this module through `--middleware`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY_VARIABLE = "VLLM_API_KEY"
NAME_VARIABLE = "VIME_SERVER_NAME"
NAME_HEADER = "X-Vime-Server"
_REFUSED = b'{"error": "this engine needs the key of its run"}'


class RequireKey:
    """ASGI middleware: 401 without `Authorization: Bearer <key>`, on any path.

    Answers carry the name given to the server at its start, so that the starter can detect another server on the port.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set: the server would be open to everyone")
        self._name = os.environ.get(NAME_VARIABLE, "").encode()
        self._expected = hashlib.sha256(b"Bearer " + key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif self._knows(scope):
            await self._app(scope, receive, self._naming(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(_REFUSED)).encode())]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": _REFUSED})

    def _naming(self, send: Send) -> Send:
        async def named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (NAME_HEADER.lower().encode(), self._name)]
            await send(message)

        return named

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(hashlib.sha256(given[0]).digest(), self._expected)
