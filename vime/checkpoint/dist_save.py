"""Lazy saving of Megatron's `torch_dist` by any number of ranks: each thread has one tensor in memory at a time.

A save interrupted at any byte leaves a hidden folder, from which the next one resumes.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from vime.checkpoint.allowed import read_common
from vime.checkpoint.dist_writer import FILE_BYTES, PartWriter
from vime.checkpoint.torch_dist import write_tracker
from vime.errors import BadInput, VimeError
from vime.run.checkpoints import RELEASE, TRACKER
from vime.system.files import READABLE, publish_folder, read_json, require_space, write_file, write_json

PARTIAL = f".{RELEASE}.partial"
STAMP = ".vime_convert.json"
MADE_FROM = "vime_made_from"


@dataclass(frozen=True)
class Chunk:
    """A box of a key, written by one rank.

    `load` makes the tensor at the time of writing: a new one, freed afterwards, or a view of a mapped file.
    """

    key: str
    shape: tuple[int, ...]
    """Shape of the whole key."""
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


class _LazySavePlanner(SavePlanner):
    """Plans a rank's chunks and objects, and makes their data one at a time."""

    def __init__(self, chunks: Sequence[Chunk], objects: Mapping[str, Any], said: Callable[[int], None]) -> None:
        self._chunks = {(chunk.key, chunk.offset): chunk for chunk in chunks}
        self._objects = objects
        self._said = said

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(chunk.key, torch.Size(chunk.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(chunk.offset), sizes=torch.Size(chunk.size)),
                    properties=TensorProperties(dtype=chunk.dtype),
                    size=torch.Size(chunk.shape),
                ),
            )
            for chunk in self._chunks.values()
        ]
        items += [WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in self._objects]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], data)
            return data
        assert write_item.index.offset is not None
        chunk = self._chunks[write_item.index.fqn, tuple(write_item.index.offset)]
        tensor = chunk.load().to(chunk.dtype).reshape(chunk.size).contiguous()
        self._said(tensor.nbytes)
        # torch.save writes a whole storage, of which a box of a mapped tensor is only a part.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def save(
    save_dir: Path,
    chunks: Sequence[Chunk],
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
    *,
    made_from: Mapping[str, Any],
    cut: Mapping[str, Any],
    threads: int = 1,
    file_bytes: int = FILE_BYTES,
    said: Callable[[int], None] = lambda _: None,
) -> bool:
    """Write `<save_dir>/release` with all ranks of the default process group, and the tracker last. Collective.

    `chunks` and `objects` are this rank's; every box and object is given by exactly one rank. `common` goes to
    `common.pt`. `made_from` (JSON) identifies the source, `cut` the ranks and layout: an interrupted save with equal
    values is resumed; a complete one of the same source is left unchanged, and False returned. Each of `threads` makes
    and writes its own chunks, a file of about `file_bytes` at a time. Raises the error of any `load` on every rank,
    and BadInput for a folder that holds another checkpoint, or a disk without room for this one.
    """
    partial, first = save_dir / PARTIAL, dist.get_rank() == 0
    needed = _sum_over_ranks(sum(torch.Size(chunk.size).numel() * chunk.dtype.itemsize for chunk in chunks))
    if not _agree(lambda: prepare(save_dir, made_from, {**cut, "file_bytes": file_bytes}, needed)):
        return False
    writer = PartWriter(partial, threads=threads, file_bytes=file_bytes, skipped=said)
    with _without_checksums():
        try:
            dcp.save({}, storage_writer=writer, planner=_LazySavePlanner(chunks, objects, said))
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values() if isinstance(cause, (VimeError, OSError))]
            raise (causes or [error])[0] from error
    if first:
        write_file(partial / "common.pt", _serialised({**common, MADE_FROM: dict(made_from)}), mode=READABLE)
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
        write_json(partial / "metadata.json", {**backend, "common_backend_version": 1}, mode=READABLE)
        publish_folder(partial, save_dir / RELEASE)
        _finish(save_dir)
    dist.barrier()
    return True


def prepare(save_dir: Path, made_from: Mapping[str, Any], cut: Mapping[str, Any], needed: int) -> bool:
    """Make the folder to write into, or find the interrupted one's; returns False if all is complete already.

    The complete folder takes `needed` bytes. Raises BadInput before anything is written.
    """
    partial, release, stamp = save_dir / PARTIAL, save_dir / RELEASE, {"made_from": made_from, "cut": cut}
    if release.exists():
        if not _is_made_from(release, made_from):
            raise BadInput(f"{release} exists and is not made from this source: give --save a new folder or remove it")
        # The interruption may have come between the last renames.
        _finish(save_dir)
        return False
    if (save_dir / TRACKER).exists():
        raise BadInput(f"{save_dir / TRACKER} exists: give --save a new folder or remove it")
    goes_on = read_json(partial / STAMP) == stamp
    there = sum(file.stat().st_size for file in partial.glob("__*.distcp")) if goes_on else 0
    folder = save_dir
    while not folder.exists():
        folder = folder.parent
    require_space(folder, needed - there, reclaimed=0 if goes_on else _bytes_below(partial))
    if not goes_on:
        save_dir.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        write_json(partial / STAMP, stamp, mode=READABLE)
    # Written before an interruption, and again at the end.
    (partial / ".metadata").unlink(missing_ok=True)
    return True


def _is_made_from(release: Path, made_from: Mapping[str, Any]) -> bool:
    """True if a complete folder was made from this source."""
    try:
        return read_common(release / "common.pt").get(MADE_FROM) == made_from
    except (BadInput, OSError, RuntimeError, pickle.UnpicklingError):
        return False


def _finish(save_dir: Path) -> None:
    """Write the tracker and remove notes after a complete folder's rename; repeated after an interruption."""
    if not (save_dir / TRACKER).exists():
        write_tracker(save_dir, RELEASE)
    for pattern in (".__*", STAMP):
        for note in (save_dir / RELEASE).glob(pattern):
            note.unlink()


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _sum_over_ranks(count: int) -> int:
    total = torch.tensor(count)
    dist.all_reduce(total)
    return int(total)


def _agree(decide: Callable[[], bool]) -> bool:
    """Rank 0's decision, or its error, on every rank."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [decide()]
        except (BadInput, OSError) as error:
            answer = [error]
    dist.broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Skip the checksums of torch.save: torch.load never checks them, and they cost as much as the cast."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _serialised(content: Any) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()
