"""A key-value store for the ranks of a group that answers only who knows the key. Standard library only.

The operations are those of torch's stores (`vime.system.guarded_store` is the client). A connection that does not
complete the challenge in time is closed before anything of it is read as a request.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Sequence

from vime.system.handshake import (
    CLIENT,
    LENGTH_BYTES,
    NONCE_BYTES,
    SERVER,
    SIGNATURE_BYTES,
    Refused,
    Session,
    nonce,
    same,
    sign,
)

CHALLENGE_S = 10.0
"""Time for the challenge of a new connection."""
DONE, LATE = b"done", b"late"


class StoreServer:
    """Serves a listening socket from a thread of its own until `close`."""

    def __init__(self, listener: socket.socket, key: bytes) -> None:
        self._key, self._listener = key, listener
        self._values: dict[bytes, bytes] = {}
        self._waiting: dict[bytes, set[asyncio.Future[None]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="store", daemon=True)
        self._thread.start()

    def read(self, key: str) -> bytes | None:
        """Value of a key, from any thread; None without one."""
        return self._values.get(key.encode())

    def write(self, key: str, value: bytes) -> None:
        """Set a key, from any thread."""
        self._loop.call_soon_threadsafe(self._put, key.encode(), value)

    def close(self) -> None:
        """Stop serving; open connections end."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, sock=self._listener))
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            session = await asyncio.wait_for(self._challenge(reader, writer), CHALLENGE_S)
            while True:
                frame = await reader.readexactly(Session.rest(await reader.readexactly(LENGTH_BYTES)))
                writer.write(session.seal(await self._answer(*session.open(frame))))
                await writer.drain()
        except (Refused, TimeoutError, asyncio.IncompleteReadError, asyncio.CancelledError, OSError):
            pass  # the other end has gone, or is none of the group's, or the server is closed
        finally:
            writer.close()

    async def _challenge(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Session:
        challenge = nonce()
        writer.write(challenge)
        counter = await reader.readexactly(NONCE_BYTES)
        answer = await reader.readexactly(SIGNATURE_BYTES)
        if not same(answer, sign(self._key, CLIENT, challenge, counter)):
            writer.write(bytes(SIGNATURE_BYTES))
            raise Refused("a wrong answer to the challenge")
        writer.write(sign(self._key, SERVER, challenge, counter))
        return Session(self._key, SERVER, challenge, counter)

    async def _answer(self, operation: bytes, *arguments: bytes) -> Sequence[bytes]:
        """Reply to one request. The first argument of `get` and `wait` is their limit in milliseconds."""
        values = self._values
        match operation, arguments:
            case b"set", (key, value):
                self._put(key, value)
                return (DONE,)
            case b"get" | b"wait", (limit, *keys):
                if not await self._all_there(keys, int(limit) / 1000):
                    return (LATE, *(key for key in keys if key not in values))
                return (DONE, *(values[key] for key in keys if operation == b"get"))
            case b"check", keys:
                return (DONE, b"1" if all(key in values for key in keys) else b"")
            case b"add", (key, amount):
                self._put(key, b"%d" % (int(values.get(key, b"0")) + int(amount)))
                return (DONE, values[key])
            case b"append", (key, value):
                self._put(key, values.get(key, b"") + value)
                return (DONE,)
            case b"swap", (key, expected, desired):
                if values.get(key, b"") == expected:
                    self._put(key, desired)
                return (DONE, values.get(key, expected))
            case b"delete", (key,):
                return (DONE, b"" if values.pop(key, None) is None else b"1")
            case b"count", ():
                return (DONE, b"%d" % len(values))
        raise Refused(f"an unknown request {operation!r} with {len(arguments)} arguments")

    def _put(self, key: bytes, value: bytes) -> None:
        self._values[key] = value
        for waiter in self._waiting.pop(key, ()):
            if not waiter.done():
                waiter.set_result(None)

    async def _all_there(self, keys: Sequence[bytes], limit: float) -> bool:
        """Wait for the keys; False if one is missing at the limit, in seconds."""
        end = self._loop.time() + limit
        while missing := next((key for key in keys if key not in self._values), None):
            waiter = self._loop.create_future()
            waiters = self._waiting.setdefault(missing, set())
            waiters.add(waiter)
            try:
                await asyncio.wait_for(waiter, end - self._loop.time())
            except TimeoutError:
                return False
            finally:
                waiters.discard(waiter)
        return True


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens on the address; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=4096)
