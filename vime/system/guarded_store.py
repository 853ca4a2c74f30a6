"""torch's key-value store, served only to processes that know the group's key. Needs torch.

torch's own TCPStore asks nobody for a credential, and holds what lets a stranger join a group: addresses of ranks, and
NCCL's identifiers.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from vime.system.handshake import (
    CLIENT,
    LENGTH_BYTES,
    NONCE_BYTES,
    SERVER,
    SIGNATURE_BYTES,
    Session,
    nonce,
    same,
    sign,
)
from vime.system.store_server import CHALLENGE_S, DONE, StoreServer

StoreError = dist.DistStoreError
"""A request that was not answered, or a key that nobody set in time; a RuntimeError."""
ANSWER_S = 60.0
"""Time for an answer, beyond the wait that a request asks for."""
RETRY_S = 0.1


class GuardedStore(dist.Store):
    """Client of a `StoreServer`; each thread that asks at the same time has a connection of its own.

    C++ calls the methods under torch's names.
    """

    def __init__(
        self, address: str, port: int, key: bytes, timeout: timedelta, *, server: StoreServer | None = None
    ) -> None:
        super().__init__()
        self.set_timeout(timeout)
        self._place, self._key, self._server = (address, port), key, server
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()
        self._ask(b"check")  # connects, so that a wrong key is an error here

    def close(self) -> None:
        """End the connections, and the server if this member has it."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        if self._server is not None:
            self._server.close()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(b"set", key, value)

    def get(self, key: str) -> bytes:
        return self._wait_for(b"get", [key], self.timeout)[0]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._wait_for(b"wait", keys, timeout or self.timeout)

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(b"add", key, str(amount))[0])

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(b"check", *keys)[0] == b"1"

    def append(self, key: str, value: str | bytes) -> None:
        self._ask(b"append", key, value)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._ask(b"swap", key, expected, desired)[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._wait_for(b"get", keys, self.timeout)

    def multi_set(self, keys: Sequence[str], values: Sequence[str | bytes]) -> None:
        for key, value in zip(keys, values, strict=True):
            self.set(key, value)

    def has_extended_api(self) -> bool:
        return True

    def delete_key(self, key: str) -> bool:
        return self._ask(b"delete", key)[0] == b"1"

    def num_keys(self) -> int:
        return int(self._ask(b"count")[0])

    deleteKey, getNumKeys = delete_key, num_keys

    def _wait_for(self, operation: bytes, keys: Sequence[str], timeout: timedelta) -> list[bytes]:
        seconds = timeout.total_seconds()
        return self._ask(operation, str(round(1000 * seconds)), *keys, wait_s=seconds)

    def _ask(self, operation: bytes, *arguments: str | bytes, wait_s: float = 0.0) -> list[bytes]:
        """Reply to one request. Raises StoreError when it does not come, or says that a key is missing."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        try:
            if connection is None:
                connection = _connect(self._place, self._key, self.timeout.total_seconds())
            status, *values = connection.ask([operation, *map(_octets, arguments)], wait_s + ANSWER_S)
        except (OSError, _Stranger) as error:
            if connection is not None:
                connection.close()
            raise StoreError(f"the group's store at {_words(self._place)}: {error}") from error
        with self._lock:
            self._idle.append(connection)
        if status != DONE:
            missing = ", ".join(value.decode(errors="replace") for value in values[:4])
            raise StoreError(f"wait timeout after {wait_s:.0f} s, keys that nobody has set: {missing}")
        return values


class _Stranger(Exception):
    """The server does not know the group's key, or does not take ours."""


class _Connection:
    """One authenticated connection."""

    def __init__(self, place: tuple[str, int], key: bytes) -> None:
        self._socket = socket.create_connection(place, timeout=CHALLENGE_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            challenge, counter = self._read(NONCE_BYTES), nonce()
            self._socket.sendall(counter + sign(key, CLIENT, challenge, counter))
            if not same(self._read(SIGNATURE_BYTES), sign(key, SERVER, challenge, counter)):
                raise _Stranger("it has another key than this member of the group")
        except BaseException:
            self._socket.close()
            raise
        self._session = Session(key, CLIENT, challenge, counter)

    def ask(self, parts: Sequence[bytes], limit: float) -> list[bytes]:
        self._socket.settimeout(limit)
        self._socket.sendall(self._session.seal(parts))
        return self._session.open(self._read(Session.rest(self._read(LENGTH_BYTES))))

    def close(self) -> None:
        self._socket.close()

    def _read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            if not (more := self._socket.recv(size - len(found))):
                raise ConnectionResetError("it closed the connection")
            found += more
        return bytes(found)


def _connect(place: tuple[str, int], key: bytes, limit: float) -> _Connection:
    """Connect; until the limit, in seconds, also to a server that is not there yet."""
    end = time.monotonic() + limit
    while True:
        try:
            return _Connection(place, key)
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(RETRY_S)


def _octets(argument: str | bytes) -> bytes:
    return argument.encode() if isinstance(argument, str) else argument


def _words(place: tuple[str, int]) -> str:
    return f"{place[0]} port {place[1]}"
