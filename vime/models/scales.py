"""Scales of a block-fp8 folder, checked without torch: one for every fp8 tensor, none too many, all finite."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.models.folder import INDEX, SINGLE, header

SUFFIX = "_scale_inv"
_FP8 = "F8_E4M3"
_READERS = 16
"""Threads that read scales: each is a small read at another place of a shared file system."""


@dataclass(frozen=True)
class _Stored:
    file: Path
    dtype: str
    begin: int
    """Offset in the file, in bytes."""
    size: int


def check_scales(folder: Path, *, quantised: bool, most: int | None = None) -> None:
    """Raise BadInput for an fp8 tensor without a scale, a scale without an fp8 tensor, or one with NaN or infinity.

    `quantised`: config.json has a quantization_config. Reads the headers of the files that are there, and the values of
    the first `most` scales; None: of all. Of a folder that is still being fetched, no tensor is missed.
    """
    tensors, whole = _tensors(folder), all((folder / name).is_file() for name in _files(folder))
    for name, stored in tensors.items():
        if stored.dtype == _FP8 and not quantised:
            raise BadInput(
                f"{stored.file}: {name} is stored in fp8 but config.json has no quantization_config: take the "
                "config.json of the same checkpoint"
            )
        if stored.dtype == _FP8 and name + SUFFIX not in tensors and whole:
            raise BadInput(f"{stored.file}: {name} is stored in fp8 but no file has {name + SUFFIX}: fetch it again")
        if name.endswith(SUFFIX):
            _check_weight(name, stored, tensors.get(name.removesuffix(SUFFIX)), whole)
    scales = [(name, stored) for name, stored in tensors.items() if name.endswith(SUFFIX)][:most]
    if not scales:
        return
    # Imported here: most dry runs have no checkpoint to read.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_READERS) as pool:
        for (name, stored), finite in zip(scales, pool.map(lambda scale: _is_finite(scale[1]), scales), strict=True):
            if not finite:
                raise BadInput(f"{stored.file}: {name} holds NaN or infinity: fetch the checkpoint again")


def _check_weight(name: str, scale: _Stored, weight: _Stored | None, whole: bool) -> None:
    of = name.removesuffix(SUFFIX)
    if weight is None and whole:
        raise BadInput(
            f"{scale.file}: {name} is a scale, but no file has {of}: remove it, or fetch the checkpoint again"
        )
    if weight is not None and weight.dtype != _FP8:
        raise BadInput(
            f"{scale.file}: {name} is a scale, but {of} is stored as {weight.dtype}, not in fp8: remove the scale, or "
            "fetch the checkpoint again"
        )


def _files(folder: Path) -> set[str]:
    try:
        if (folder / INDEX).is_file():
            return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    return {SINGLE}


def _tensors(folder: Path) -> dict[str, _Stored]:
    return {name: stored for file in sorted(_files(folder)) for name, stored in _of_file(folder / file)}


def _of_file(path: Path) -> Iterator[tuple[str, _Stored]]:
    try:
        content = header(path)
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
    except (OSError, ValueError):
        return
    for name, entry in content.items():
        if name != "__metadata__" and (stored := _entry(path, start, entry)):
            yield name, stored


def _entry(path: Path, start: int, entry: Any) -> _Stored | None:
    """A tensor of a header; None for an entry that is none, which the check of shards refuses."""
    try:
        begin, end = entry["data_offsets"]
        return _Stored(path, str(entry["dtype"]), start + int(begin), int(end) - int(begin))
    except (KeyError, TypeError, ValueError):
        return None


_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00}


def _is_finite(scale: _Stored) -> bool:
    with scale.file.open("rb") as file:
        file.seek(scale.begin)
        content = file.read(scale.size)
    if scale.dtype == "F32":
        return math.isfinite(sum(array("f", content[: len(content) // 4 * 4])))
    if scale.dtype in _EXPONENT:
        mask = _EXPONENT[scale.dtype]
        return all(value & mask != mask for value in array("H", content[: len(content) // 2 * 2]))
    return scale.dtype != "F8_E8M0" or b"\xff" not in content
