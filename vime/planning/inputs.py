"""Completeness of an HF checkpoint on disk, from file sizes and headers alone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.models.folder import INDEX, SINGLE, other_kind

_LARGEST_HEADER = 100 * 10**6
"""Header length limit set by the safetensors format."""


def check_shards(folder: str | os.PathLike[str]) -> int:
    """Total bytes of all shards. Raises BadInput for a missing, truncated or invalid safetensors file."""
    return sum(_check_shard(path) for path in sorted(_shards(Path(folder))))


def _shards(folder: Path) -> Iterator[Path]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise BadInput(other_kind(folder))
        yield folder / SINGLE
        return
    content = read_json(index)
    names = set(content.get("weight_map", {}).values()) if isinstance(content.get("weight_map"), dict) else set()
    if not names or not all(isinstance(name, str) for name in names):
        raise BadInput(f"{index} has no weight_map: download the checkpoint again")
    for name in names:
        yield folder / name


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"there is no {path}: give the folder of an HF checkpoint") from error
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: download the checkpoint again") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path} is not a JSON object: download the checkpoint again")
    return content


def _check_shard(path: Path) -> int:
    """Size of the file, checked against its header: 8 bytes of header length, header, tensors."""
    again = "download it again"
    try:
        with path.open("rb") as file:
            actual = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if actual < 8 or length > _LARGEST_HEADER:
                raise BadInput(f"checkpoint shard {path} is not a safetensors file: {again}")
            if actual < 8 + length:
                raise BadInput(f"checkpoint shard {path} is cut inside its header: {again}")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except FileNotFoundError as error:
        raise BadInput(f"checkpoint shard {path} is missing: {again}") from error
    except OSError as error:
        raise BadInput(f"cannot read checkpoint shard {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise BadInput(f"checkpoint shard {path} has a broken header: {again}") from error
    expected = 8 + length + max(ends, default=0)
    if actual != expected:
        raise BadInput(f"checkpoint shard {path} has {actual} bytes where its header says {expected}: {again}")
    return actual
