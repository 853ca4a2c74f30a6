"""Megatron's `torch_dist` checkpoints, read and written without Megatron.

The format is torch's distributed checkpoint with Megatron's keys. Writing is lazy: a chunk's tensor is made when its
turn comes and freed when it is on the disk, so a rank needs memory for one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from vime.checkpoint.hf_writer import publish_folder
from vime.errors import BadInput, VimeError
from vime.models.config import ModelConfig
from vime.models.disk import canonical_key, disk_place
from vime.models.namemap import Param

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"


@dataclass(frozen=True)
class Chunk:
    """A box of a key, written by one rank.

    `load` makes the tensor when it is written: one of its own, which is freed after that, or a view of a mapped file.
    """

    key: str
    shape: tuple[int, ...]
    """Of the whole key."""
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
        self._thread = threading.local()

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
        self._release_last()
        tensor = chunk.load().to(chunk.dtype).reshape(chunk.size).contiguous()
        self._thread.last = tensor
        self._said(tensor.numel() * tensor.element_size())
        return tensor

    def _release_last(self) -> None:
        """Frees what this thread has written; torch's writer keeps a tensor of every key until its file is closed."""
        last: torch.Tensor | None = getattr(self._thread, "last", None)
        if last is not None and last.untyped_storage().resizable():
            last.untyped_storage().resize_(0)


def object_name(key: str, index: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> str:
    """Name of an object (Megatron's `_extra_state`) that is one of `stack` under its key."""
    return f"{key}/shard_{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, stack or (1,)))}"


def save(
    save_dir: Path,
    chunks: Sequence[Chunk],
    objects: Mapping[str, Any],
    common: dict[str, Any],
    *,
    threads: int = 1,
    said: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes `<save_dir>/release` with all ranks of the default process group, and the tracker last. Collective.

    `chunks` and `objects` are this rank's; every box and object is given by exactly one rank. `common` goes to
    `common.pt`. Each of `threads` makes and writes its own chunks, to a file of its own. Raises what a rank's `load`
    raised, on every rank.
    """
    partial, first = save_dir / f".{RELEASE}.partial", dist.get_rank() == 0
    if first:
        save_dir.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
    dist.barrier()
    writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True, thread_count=threads)
    try:
        dcp.save({}, storage_writer=writer, planner=_LazySavePlanner(chunks, objects, said))
    except CheckpointException as error:
        raise next((cause for cause, _ in error.failures.values() if isinstance(cause, VimeError)), error) from error
    if first:
        _write(partial / "common.pt", _serialised(common))
        backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
        _write(partial / "metadata.json", json.dumps({**backend, "common_backend_version": 1}).encode())
        publish_folder(partial, save_dir / RELEASE)
        write_tracker(save_dir, RELEASE)
    dist.barrier()


def use_disk_keys(sharded_state_dict: Any, config: ModelConfig) -> None:
    """Renames, in place, the keys of a Megatron model's `sharded_state_dict()` to those of the disk.

    Call it before `dist_checkpointing.save` or `load` (and before the optimizer's state is made from it), so that a
    checkpoint does not depend on the layer spec that ran.
    """
    if isinstance(sharded_state_dict, dict):
        for value in sharded_state_dict.values():
            use_disk_keys(value, config)
    elif isinstance(sharded_state_dict, list):
        for value in sharded_state_dict:
            use_disk_keys(value, config)
    elif isinstance(getattr(sharded_state_dict, "key", None), str):
        sharded_state_dict.key = canonical_key(sharded_state_dict.key, config)


def write_tracker(save_dir: Path, content: str) -> None:
    """Names the newest complete checkpoint of a folder, by rename."""
    draft = save_dir / f".{TRACKER}"
    _write(draft, content.encode())
    os.replace(draft, save_dir / TRACKER)


def checkpoint_folder(path: str | Path) -> Path:
    """The folder that holds `.metadata`: `path` itself or the one that its tracker names."""
    path = Path(path)
    if (path / ".metadata").exists():
        return path
    try:
        name = (path / TRACKER).read_text().strip()
    except OSError as error:
        raise BadInput(f"{path} has neither .metadata nor {TRACKER}: give a torch_dist folder") from error
    folder = path / (f"iter_{int(name):07d}" if name.isdigit() else name)
    if not (folder / ".metadata").exists():
        raise BadInput(f"{path / TRACKER} names {name}, but {folder} is no complete torch_dist folder: convert again")
    return folder


class TorchDistReader:
    """A torch_dist folder for reading parameters one at a time, in one process, at any layout it was written with."""

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.path = checkpoint_folder(path)
        self.config = config
        self._reader = dcp.FileSystemReader(self.path)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __contains__(self, param: Param) -> bool:
        return isinstance(
            self._metadata.state_dict_metadata.get(disk_place(param, self.config).key), TensorStorageMetadata
        )

    def dtype(self, param: Param) -> torch.dtype:
        """The type in which the parameter is stored."""
        return self._stored(param).properties.dtype

    def read(self, param: Param) -> torch.Tensor:
        """The whole parameter, as stored."""
        place, stored = disk_place(param, self.config), self._stored(param)
        target = torch.empty((1,) * len(place.index) + param.shape, dtype=stored.properties.dtype)
        # Padding rows of a vocabulary lie behind the box.
        offset = torch.Size((*place.index, *(0 for _ in param.shape)))
        box = ChunkStorageMetadata(offsets=offset, sizes=target.shape)
        items = create_read_items_for_chunk_list(place.key, stored, [box])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            raise BadInput(f"{self.path}: {place.key} holds {covered} of the {target.numel()} elements of {param.name}")
        planner = _BoxPlanner(target)
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except (OSError, EOFError, RuntimeError) as error:
            raise BadInput(f"{self.path}: cannot read {place.key} ({error}): convert again") from error
        return target.view(param.shape)

    def common(self) -> dict[str, Any]:
        """The content of `common.pt`."""
        return torch.load(self.path / "common.pt", weights_only=True)

    def _stored(self, param: Param) -> TensorStorageMetadata:
        place = disk_place(param, self.config)
        stored = self._metadata.state_dict_metadata.get(place.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise BadInput(f"{self.path} has no {place.key}: it is a checkpoint of another model")
        wanted, found = place.stack + param.shape, tuple(stored.size)
        padded = param.tp_dim == 0 and len(found) == len(wanted) and found[1:] == wanted[1:] and found[0] >= wanted[0]
        if found != wanted and not padded:
            raise BadInput(f"{self.path}: {place.key} has the shape {list(found)}, but the config means {list(wanted)}")
        return stored


class _BoxPlanner(LoadPlanner):
    """Reads boxes of one key into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are read")

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert read_item.type == LoadItemType.TENSOR
        index = tuple(slice(a, a + n) for a, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        return self._target[index]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def _serialised(content: Any) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
