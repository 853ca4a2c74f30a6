"""Cheap fingerprints that detect changed files without reading them whole.

They catch files that were cut, written over, replaced, or copied incompletely under their old time. A change between
the samples of a large file goes unseen; only a deep verification finds that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

WHOLE_BYTES = 16 * 2**20
"""Files up to this size are hashed whole."""
BLOCKS, BLOCK_BYTES = 16, 64 * 2**10
"""Samples of a larger file, evenly spread from its first to its last byte."""
HEADER_BYTES = 256 * 2**10
"""At most this much of a safetensors header is hashed."""
THREADS = 32
"""A shared file system answers many small reads at once as fast as one."""


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of one file."""

    size: int
    """Bytes."""
    mtime_ns: int
    inode: int
    digest: str
    """BLAKE2b of size and samples, 32 hexadecimal digits."""


def fingerprint(path: Path) -> Fingerprint:
    """Fingerprint of a file. Raises OSError where it cannot be read."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(file)
        digest = hashlib.blake2b(str(status.st_size).encode(), digest_size=16)
        for offset, size in _samples(file, status.st_size, path.suffix):
            digest.update(_read(file, size, offset))
    finally:
        os.close(file)
    return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ino, digest.hexdigest())


def fingerprints(paths: Sequence[Path]) -> list[Fingerprint]:
    """Fingerprints of files, in their order. Raises OSError for the first that cannot be read."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(fingerprint, paths))


def _samples(file: int, size: int, suffix: str) -> list[tuple[int, int]]:
    """(offset, bytes) of the parts that are hashed of a file of `size` bytes."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    samples = [((size - BLOCK_BYTES) * block // (BLOCKS - 1), BLOCK_BYTES) for block in range(BLOCKS)]
    if suffix == ".safetensors":
        header = 8 + int.from_bytes(_read(file, 8, 0), "little")
        samples[0] = (0, max(BLOCK_BYTES, min(header, HEADER_BYTES)))
    return samples


def _read(file: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes; fewer where the file is cut meanwhile, which gives another digest."""
    data = b""
    while len(data) < size:
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
