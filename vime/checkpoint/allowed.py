"""Checks of a torch_dist folder's pickles before torch or Megatron open them, so that their writer runs no code here.

A pickle names the functions that it wants called. `.metadata` and `common.pt` of a good folder need only the few
below; any other name is refused before its import. A folder is checked first and opened later, so changes in between
are not caught: keep folders that you load from out of others' reach meanwhile.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections.abc import Set
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from vime.errors import BadInput

_DCP = "torch.distributed.checkpoint"
METADATA_NAMES = frozenset(
    {
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        (f"{_DCP}.metadata", "BytesStorageMetadata"),
        (f"{_DCP}.metadata", "ChunkStorageMetadata"),
        (f"{_DCP}.metadata", "Metadata"),
        (f"{_DCP}.metadata", "MetadataIndex"),
        (f"{_DCP}.metadata", "StorageMeta"),
        (f"{_DCP}.metadata", "TensorProperties"),
        (f"{_DCP}.metadata", "TensorStorageMetadata"),
        (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_DCP}.planner", "SavePlan"),
        (f"{_DCP}.planner", "TensorWriteData"),
        (f"{_DCP}.planner", "WriteItem"),
        (f"{_DCP}.planner", "WriteItemType"),
        *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)),
    }
)
"""(module, name) pairs allowed in `.metadata`, as torch and Megatron write it."""
EXTRA_STATE = "._extra_state/shard_"
"""Part of the names of objects that hold the state of Transformer Engine modules."""
COMMON_NAMES = frozenset({("argparse", "Namespace")})
"""(module, name) pairs allowed in `common.pt`: plain dicts, lists, numbers, strings, and arguments in a namespace."""
RANDOM_STATE = "rng_state/shard_"
"""Begin of the names of objects that hold the state of random generators."""
_MOST_COMMON_BYTES = 256 * 2**20
_ERRORS = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, ImportError)
"""Errors raised by damaged pickles, besides MemoryError and RecursionError for absurd lengths and depths."""


class _Refused(Exception):
    """The pickle asks for a name that is not allowed."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, allowed: Set[tuple[str, str]]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("builtins", "getattr"):
            # How Python 3.11.0 to 3.11.3 pickle a member of an enumeration.
            return self._member
        if (module, name) not in self._allowed:
            raise _Refused(f"{module}.{name}"[:200])
        return super().find_class(module, name)

    def _member(self, kind: Any, name: Any) -> Any:
        """`getattr` of an allowed enumeration's members, and of nothing else."""
        if isinstance(kind, EnumType) and (kind.__module__, kind.__qualname__) in self._allowed:
            return kind.__members__[name]
        raise _Refused("builtins.getattr")


def read_metadata(folder: Path) -> Metadata:
    """Content of `.metadata`. Raises BadInput if it is damaged, asks for names not allowed, or points outside."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as stream:
            content = _load(path, stream, METADATA_NAMES)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}: give a torch_dist folder") from error
    if not isinstance(content, Metadata):
        raise BadInput(f"{path} holds no metadata of a torch_dist folder: convert again, or give another folder")
    kinds = (TensorStorageMetadata, BytesStorageMetadata)
    if not isinstance(content.state_dict_metadata, dict) or not isinstance(content.storage_data, dict):
        raise BadInput(f"{path} lists no tensors: convert again, or give another folder")
    for key, stored in content.state_dict_metadata.items():
        if not isinstance(stored, kinds):
            raise BadInput(f"{path}: {str(key)[:200]!r} is not a tensor: convert again, or give another folder")
    for place in content.storage_data.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or os.sep in name or name in (".", ".."):
            raise BadInput(f"{path} names a file {str(name)[:200]!r}, which is not in its folder: do not use it")
    return content


def check_training_checkpoint(folder: Path) -> None:
    """Raise BadInput unless Megatron can open the folder without calling anything chosen by its writer.

    Megatron unpickles stored objects on request; a training checkpoint has tensors, module states (`EXTRA_STATE`) and
    states of generators (`RANDOM_STATE`), which vime writes for others and never requests.
    """
    for key, stored in read_metadata(folder).state_dict_metadata.items():
        known = EXTRA_STATE in key or key.startswith(RANDOM_STATE)
        if isinstance(stored, BytesStorageMetadata) and not known:
            raise BadInput(f"{folder}: {key[:200]!r} is an object, where a training checkpoint has tensors alone")
    check_common(folder / "common.pt")
    path = folder / "metadata.json"
    try:
        backend = json.loads(path.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"cannot read {path} ({type(error).__name__}): give another --load") from error
    if backend != "torch_dist":
        raise BadInput(f"{path} says {str(backend)[:100]!r}: only torch_dist is read")


def read_common(path: Path) -> dict[str, Any]:
    """Content of `common.pt`. Raises BadInput for one that holds more than plain values."""
    check_common(path)
    # Its end removes what it was given, also what Megatron allowed on import for all of the process.
    more = {argparse.Namespace} - set(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals(list(more)):
        return torch.load(path, weights_only=True)


def check_common(path: Path) -> None:
    """Raise BadInput unless a `torch.save` file holds only plain values."""
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > _MOST_COMMON_BYTES:
                        raise BadInput(f"{path} unpacks to {entry.file_size} bytes: it is not a file of a checkpoint")
                    _load(path, io.BytesIO(archive.read(entry)), COMMON_NAMES)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}: give another folder") from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise BadInput(f"{path} is not a file of a checkpoint ({error}): give another folder") from error


def _load(path: Path, stream: Any, allowed: Set[tuple[str, str]]) -> Any:
    try:
        return _Unpickler(stream, allowed).load()
    except _Refused as error:
        raise BadInput(
            f"{path} asks for {error}, which no checkpoint needs and which could run anything: do not use this folder"
        ) from error
    except (*_ERRORS, MemoryError, RecursionError, OverflowError) as error:
        raise BadInput(f"{path} is damaged ({type(error).__name__}): convert again, or give another folder") from error
