"""One safetensors file: its header, read and checked, and its tensors, mapped into memory.

Format: 8 bytes little-endian length of a JSON header, the header (`name -> dtype, shape, data_offsets`, with offsets
from the end of the header), then the bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from vime.errors import BadInput

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """Place of a tensor: `begin` and `end` are byte offsets in the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensors of a file. Raises BadInput, naming file and tensor, if header and file size do not match."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise BadInput(f"{file} is not a complete safetensors file ({size} bytes): fetch it again")
            text = stream.read(length)
    except OSError as error:
        raise BadInput(f"cannot read {file} ({error.strerror}): fetch the checkpoint again") from error
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        start, end = 8 + length, 8 + length
        tensors = {}
        for name, entry in header.items():
            tensors[name] = info = _info(file, name, entry, start)
            end = max(end, info.end)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise BadInput(f"{file} has no valid safetensors header ({error}): fetch it again") from error
    if size != end:
        what = "truncated" if size < end else "longer than its header says"
        raise BadInput(f"{file} is {what}: {size} bytes instead of {end}; fetch it again")
    return tensors


def _info(file: Path, name: str, entry: dict, start: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise BadInput(f"{file}: {name} has the type {entry['dtype']}, which vime does not read")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise BadInput(
            f"{file}: {name} takes {end - begin} bytes, which does not fit its shape {list(shape)}; fetch it again"
        )
    return TensorInfo(name, file, dtype, shape, start + begin, start + end)


class Mapped:
    """Files mapped into memory on first use; tensors are views of the mapping, so that only touched pages are read.

    The mapping is private: writing into a tensor changes neither the file nor other processes' view of it.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """The tensor as stored."""
        if info.begin == info.end:
            return torch.empty(info.shape, dtype=info.dtype)
        found = self._maps.get(info.file)
        if found is None:
            with info.file.open("rb") as stream:
                found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[info.file] = found
        raw = torch.frombuffer(found, dtype=torch.uint8, count=info.end - info.begin, offset=info.begin)
        return raw.view(info.dtype).view(info.shape)

    def close(self) -> None:
        """Drop the mappings; each is released with the last tensor that views it."""
        self._maps.clear()


@dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(file: Path, specs: Iterable[Spec]) -> tuple[bytes, dict[str, TensorInfo]]:
    """Header bytes of a new file and the places of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, places = 0, []
    for spec in specs:
        header[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        places.append((spec, offset))
        offset += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    infos = {
        spec.name: TensorInfo(spec.name, file, spec.dtype, spec.shape, start + at, start + at + spec.bytes)
        for spec, at in places
    }
    return struct.pack("<Q", len(text)) + text, infos


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Bytes of a tensor as stored in the file; no copy for a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two CPU tensors of one dtype hold the same bits, NaN included."""
    flat = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
