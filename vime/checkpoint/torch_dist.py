"""Access to Megatron's `torch_dist` checkpoints without Megatron: names, tracker, reading parameter by parameter.

The format is torch's distributed checkpoint with Megatron's keys. `vime.checkpoint.dist_save` writes it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from vime.checkpoint.allowed import read_common, read_metadata
from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.disk import canonical_key, disk_place
from vime.models.namemap import Param
from vime.run.checkpoints import RELEASE, TRACKER, tracked, tracked_folder
from vime.system.files import READABLE, write_file

PARTIAL = f".{RELEASE}.partial"
STAMP = ".vime_convert.json"
MADE_FROM = "vime_made_from"


def object_name(key: str, index: tuple[int, ...] = (), stack: tuple[int, ...] = ()) -> str:
    """Name of an object (Megatron's `_extra_state`) at `index` of `stack` under its key."""
    return f"{key}/shard_{'.'.join(map(str, index or (0,)))}_{'.'.join(map(str, stack or (1,)))}"


def use_disk_keys(sharded_state_dict: Any, config: ModelConfig) -> None:
    """Rename, in place, the keys of a Megatron model's `sharded_state_dict()` to those on disk.

    Call it before `dist_checkpointing.save` or `load`, and before deriving the optimizer's state, so that a checkpoint
    does not depend on the layer spec.
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
    """Record the newest complete checkpoint of a folder, by rename."""
    write_file(save_dir / TRACKER, content, mode=READABLE)


def checkpoint_folder(path: str | Path) -> Path:
    """Folder that holds `.metadata`: `path` itself or the one that its tracker names."""
    path = Path(path)
    if (path / ".metadata").exists():
        return path
    try:
        name, folder = tracked(path), tracked_folder(path)
    except OSError as error:
        raise BadInput(f"{path} has neither .metadata nor {TRACKER}: give a torch_dist folder") from error
    if not (folder / ".metadata").exists():
        raise BadInput(
            f"{path / TRACKER} names {name}, but {folder} is not a complete torch_dist folder: convert again"
        )
    return folder


class TorchDistReader:
    """A torch_dist folder for reading parameters one at a time, in one process, whatever layout wrote it."""

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.path = checkpoint_folder(path)
        self.config = config
        self._reader = dcp.FileSystemReader(self.path)
        # Not the reader's own method, which unpickles whatever is there.
        self._metadata = read_metadata(self.path)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def __contains__(self, param: Param) -> bool:
        return isinstance(
            self._metadata.state_dict_metadata.get(disk_place(param, self.config).key), TensorStorageMetadata
        )

    def dtype(self, param: Param) -> torch.dtype:
        """Dtype in which the parameter is stored."""
        return self._stored(param).properties.dtype

    def read(self, param: Param) -> torch.Tensor:
        """The whole parameter, as stored."""
        place, stored = disk_place(param, self.config), self._stored(param)
        # Padding rows of a vocabulary lie behind the box.
        offset = (*place.index, *(0 for _ in param.shape))
        return self._read(place.key, stored, offset, (1,) * len(place.index) + param.shape).view(param.shape)

    def read_box(self, param: Param, offset: Sequence[int], size: Sequence[int]) -> torch.Tensor:
        """A box of the parameter, as stored."""
        place, stored = disk_place(param, self.config), self._stored(param)
        whole = (1,) * len(place.index) + tuple(size)
        return self._read(place.key, stored, (*place.index, *offset), whole).view(tuple(size))

    def _read(
        self, key: str, stored: TensorStorageMetadata, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> torch.Tensor:
        target = torch.empty(size, dtype=stored.properties.dtype)
        box = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=target.shape)
        items = create_read_items_for_chunk_list(key, stored, [box])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != target.numel():
            raise BadInput(f"{self.path}: {key} holds {covered} of {target.numel()} elements at {list(offset)}")
        try:
            self._reader.read_data(LoadPlan(items), _BoxPlanner(target)).wait()
        except (OSError, EOFError, RuntimeError) as error:
            raise BadInput(f"{self.path}: cannot read {key} ({error}): convert again") from error
        return target

    def common(self) -> dict[str, Any]:
        """Content of `common.pt`."""
        return read_common(self.path / "common.pt")

    def _stored(self, param: Param) -> TensorStorageMetadata:
        place = disk_place(param, self.config)
        stored = self._metadata.state_dict_metadata.get(place.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise BadInput(f"{self.path} has no {place.key}: it is a checkpoint of another model")
        wanted, found = place.stack + param.shape, tuple(stored.size)
        padded = param.tp_dim == 0 and len(found) == len(wanted) and found[1:] == wanted[1:] and found[0] >= wanted[0]
        if found != wanted and not padded:
            raise BadInput(
                f"{self.path}: {place.key} has the shape {list(found)}, but the config implies {list(wanted)}"
            )
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
