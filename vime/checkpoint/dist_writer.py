"""Writing a rank's part of a torch_dist folder, file by file, so that a second run resumes an interrupted one.

A rank's items go, in order, into files of about `file_bytes`. Each file is written as a draft, synced to disk,
renamed, and then recorded next to it; a file without a record is written again.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from vime.system.files import READABLE, draft, read_json, remove_drafts, write_at, write_json

FILE_BYTES = 2**30
"""Upper limit of the bytes that an interruption costs a thread."""
# Writeback starts early, so that the disk does not idle until the fsync.
_FLUSH_BYTES = 32 * 2**20
_OBJECT_BYTES = 1024


class PartWriter(dcp.FileSystemWriter):
    """Storage of `dcp.save` that skips items already recorded for the rank in `path`."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 1,
        file_bytes: int = FILE_BYTES,
        skipped: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`skipped` is called with the tensor bytes of files that already exist."""
        super().__init__(path)
        self._folder, self._threads, self._file_bytes, self._skipped = path, threads, file_bytes, skipped

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        prefix = plan.storage_data.prefix
        groups = group_items(plan.items, self._file_bytes)
        work = [(f"{prefix}{number}.distcp", group) for number, group in enumerate(groups)]
        with ThreadPoolExecutor(self._threads) as pool:
            parts = list(pool.map(lambda each: self._file(each[0], each[1], planner), work))
        future: Future[list[WriteResult]] = Future()
        future.set_result([result for part in parts for result in part])
        return future

    def _file(self, name: str, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        """Write the file with these items, or use the existing one."""
        keys = [_key(item) for item in items]
        places = _recorded(self._folder, name, keys)
        if places is None:
            places = _write(self._folder / name, items, planner)
            size = (self._folder / name).stat().st_size
            record = {"bytes": size, "keys": keys, "places": places}
            write_json(record_of(self._folder, name), record, mode=READABLE)
        else:
            self._skipped(sum(item_bytes(item) for item in items if item.tensor_data is not None))
        return [
            WriteResult(index=item.index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length))
            for item, (offset, length) in zip(items, places, strict=True)
        ]


def group_items(items: Sequence[WriteItem], file_bytes: int) -> list[list[WriteItem]]:
    """Items in order, cut into groups of at most `file_bytes`, or of one item."""
    groups: list[list[WriteItem]] = []
    filled = 0
    for item in items:
        size = item_bytes(item)
        if not groups or filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def item_bytes(item: WriteItem) -> int:
    """Bytes of a tensor; approximate bytes of an object."""
    if item.tensor_data is None:
        return _OBJECT_BYTES
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def record_of(folder: Path, name: str) -> Path:
    """Path of the record that a file is complete, with the places of its items."""
    return folder / f".{name}.json"


def _recorded(folder: Path, name: str, keys: list[str]) -> list[list[int]] | None:
    """Places of the items in a complete file; None if it must be written."""
    record = read_json(record_of(folder, name))
    if not isinstance(record, dict) or record.get("keys") != keys:
        return None
    try:
        complete = (folder / name).stat().st_size == record["bytes"]
    except FileNotFoundError:
        complete = False
    return record["places"] if complete else None


def _key(item: WriteItem) -> str:
    return f"{item.index.fqn} {list(item.index.offset or ())}"


def _write(path: Path, items: Sequence[WriteItem], planner: SavePlanner) -> list[list[int]]:
    """Write the items to a file, one after the other; returns [offset, bytes] of each."""
    places = []
    remove_drafts(path)
    with draft(path, mode=READABLE) as file:
        stream: Any = _Appender(file)
        for item in items:
            first = stream.position
            data: Any = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                stream.write(data.getbuffer())
            else:
                torch.save(data, stream)
            # Free it before the next one is made.
            del data
            places.append([first, stream.position - first])
        os.fsync(file)
        # Drop it from the page cache: nobody reads it soon, and the source's pages are worth more.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    return places


class _Appender(io.RawIOBase):
    """File for torch.save that flushes to disk while growing."""

    def __init__(self, file: int) -> None:
        self._file = file
        self.position = self._flushed = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        for first in range(0, len(view), _FLUSH_BYTES):
            self.position += write_at(self._file, view[first : first + _FLUSH_BYTES], self.position)
            if self.position - self._flushed >= _FLUSH_BYTES:
                # Linux starts to write these pages without waiting for completion.
                os.posix_fadvise(self._file, self._flushed, self.position - self._flushed, os.POSIX_FADV_DONTNEED)
                self._flushed = self.position
        return len(view)
