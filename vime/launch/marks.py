"""What tells that a file is the one that was seen before, without reading it whole.

A mark holds size, time and inode, and a hash over the file's header and some samples of its content. It catches files
that were cut, written over, replaced, or copied incompletely under their old time. What it does not read, only a deep
verification can tell.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vime.run.plan import Artefact

MANIFEST = ".vime-artefact.json"
NOT_CONTENT = (MANIFEST, ".vime-fetch.json", ".cache")
"""What vime and huggingface_hub note about a folder's content is none of it."""
WHOLE_BYTES = 256 * 2**10
"""Files up to this size (config, small tokenizers, an index) are hashed whole."""
HEADER_BYTES = 256 * 2**10
"""At most this much of a safetensors header is hashed."""
SAMPLE_BYTES, SAMPLES = 4096, 6
"""Evenly spread over a file, the first and the last bytes among them."""
THREADS = 16
"""A shared file system answers many small reads at once as fast as one."""

Mark = list[int | str]
"""[size in bytes, mtime in ns, inode, hash of header and samples], as JSON gives it back."""
Marks = dict[str, Mark]
"""By path below the artefact."""


def mark_artefact(artefact: Artefact) -> Marks:
    """Marks of all files of an artefact, a folder or one file; empty where it is missing."""
    root = Path(artefact.path)
    if root.is_file():
        return {root.name: mark_file(root)}
    paths = files_of(root)
    with ThreadPoolExecutor(THREADS) as pool:
        return {str(path.relative_to(root)): mark for path, mark in zip(paths, pool.map(mark_file, paths), strict=True)}


def files_of(root: Path) -> list[Path]:
    """Files of a folder that are content, sorted."""
    paths = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_CONTENT]
        paths += [Path(folder, name) for name in names if name not in NOT_CONTENT]
    return sorted(paths)


def mark_file(path: Path) -> Mark:
    """The mark of one file."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(file)
        digest = hashlib.sha256()
        for offset, size in ranges(file, status.st_size, path.suffix):
            digest.update(_read(file, size, offset))
    finally:
        os.close(file)
    return [status.st_size, status.st_mtime_ns, status.st_ino, digest.hexdigest()[:32]]


def ranges(file: int, size: int, suffix: str) -> list[tuple[int, int]]:
    """(offset, bytes) of what is hashed of a file of `size` bytes."""
    if size <= WHOLE_BYTES:
        return [(0, size)]
    step = (size - SAMPLE_BYTES) / (SAMPLES - 1)
    samples = [(round(i * step), SAMPLE_BYTES) for i in range(SAMPLES)]
    if suffix == ".safetensors":
        header = 8 + int.from_bytes(_read(file, 8, 0), "little")
        samples[0] = (0, max(SAMPLE_BYTES, min(header, HEADER_BYTES)))
    return samples


def _read(file: int, size: int, offset: int) -> bytes:
    """As many bytes as there are: a file that is cut meanwhile has another hash."""
    data = b""
    while len(data) < size:
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
