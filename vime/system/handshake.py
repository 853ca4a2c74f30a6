"""Two ends of a connection prove to each other that they know the same key, then sign every message.

Challenge and response by HMAC-SHA256; each frame's signature covers its direction and number, so that nothing can be
injected, repeated or left out. Not encrypted.
"""

from __future__ import annotations

import hmac
import secrets
import struct
from collections.abc import Sequence

NONCE_BYTES = SIGNATURE_BYTES = 32
LENGTH_BYTES = 4
LONGEST_FRAME = 64 * 2**20
SERVER, CLIENT = b"server", b"client"


class Refused(Exception):
    """The other end does not know the key, or a message is not the next one that it signed."""


def sign(key: bytes, *parts: bytes) -> bytes:
    """Signature of a sequence of byte strings."""
    return hmac.digest(key, pack(parts), "sha256")


def nonce() -> bytes:
    """A challenge that nobody has seen."""
    return secrets.token_bytes(NONCE_BYTES)


def same(signature: bytes, expected: bytes) -> bool:
    """True if both are equal, in a time that tells nothing."""
    return hmac.compare_digest(signature, expected)


class Session:
    """Frames of a connection after the challenge; `side` is this end."""

    def __init__(self, key: bytes, side: bytes, challenge: bytes, counter_challenge: bytes) -> None:
        self._key = sign(key, b"session", challenge, counter_challenge)
        self._mine, self._theirs = side, CLIENT if side == SERVER else SERVER
        self._sent = self._received = 0

    def seal(self, parts: Sequence[bytes]) -> bytes:
        """A frame: length, content, signature."""
        content = pack(parts)
        signature = sign(self._key, self._mine, struct.pack("!Q", self._sent), content)
        self._sent += 1
        return struct.pack("!I", len(content)) + content + signature

    @staticmethod
    def rest(head: bytes) -> int:
        """Bytes that follow a frame's length. Raises Refused for a frame that is too long."""
        length: int = struct.unpack("!I", head)[0]
        if length > LONGEST_FRAME:
            raise Refused(f"a frame of {length} bytes")
        return length + SIGNATURE_BYTES

    def open(self, rest: bytes) -> list[bytes]:
        """Parts of the next frame, without its length. Raises Refused unless the other end signed it as the next."""
        content, signature = rest[:-SIGNATURE_BYTES], rest[-SIGNATURE_BYTES:]
        if not same(signature, sign(self._key, self._theirs, struct.pack("!Q", self._received), content)):
            raise Refused("a frame with a wrong signature")
        self._received += 1
        return unpack(content)


def pack(parts: Sequence[bytes]) -> bytes:
    """Byte strings, each after its length."""
    return b"".join(struct.pack("!I", len(part)) + part for part in parts)


def unpack(content: bytes) -> list[bytes]:
    """Inverse of `pack`."""
    parts, start = [], 0
    while start < len(content):
        (length,) = struct.unpack_from("!I", content, start)
        start += LENGTH_BYTES
        parts.append(content[start : start + length])
        start += length
    return parts
