"""Reading of an HF checkpoint folder: every tensor whole or by box, with block fp8 dequantised."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vime.checkpoint.safetensors_file import Mapped, TensorInfo, read_header
from vime.errors import BadInput
from vime.fp8.quantise import dequantise, scale_name, scale_shape
from vime.models.config import ModelConfig, check_sizes, read_config
from vime.models.folder import check_names, fitted, other_kind
from vime.models.namemap import HFTensor, Param
from vime.models.reading import quantisation

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FORMAT = 2
"""Output version of cast and conversion; an increase makes them redo work begun by an older vime."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Buffers that some old checkpoints carry and every model computes itself.
_IGNORED = ("rotary_emb.inv_freq",)


class HFCheckpoint:
    """A folder with `config.json` and safetensors files, single or with an index.

    Opening reads all headers (not the tensors) and raises BadInput for a missing, truncated or malformed file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise BadInput(f"{self.path} is not a folder: give the folder of an HF checkpoint")
        self._mapped = Mapped()
        self.tensors = _read_index(self.path)

    @functools.cached_property
    def config(self) -> ModelConfig:
        """Model of `config.json`, with the number of MTP layers that have tensors."""
        config = ModelConfig.from_folder(self.path)
        hf, notes = fitted(config.hf, self.tensors.keys())
        return ModelConfig.from_hf(hf) if notes else config

    @functools.cached_property
    def block(self) -> tuple[int, int]:
        """Block size of fp8 tensors; also of a model that vime does not train."""
        hf = read_config(self.path)
        check_sizes(hf)
        found = quantisation(hf)
        if found is None:
            raise BadInput(
                f"{self.path} holds fp8 tensors but its config.json has no quantization_config: fetch it again"
            )
        return found.block

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Place, stored dtype and shape of a tensor."""
        found = self.tensors.get(name)
        if found is None:
            raise BadInput(f"{self.path} has no tensor {name}: fetch the checkpoint again or correct its config.json")
        return found

    def is_quantised(self, name: str) -> bool:
        """True for a tensor stored in block fp8."""
        return self.info(name).dtype == torch.float8_e4m3fn

    def stored(self, name: str) -> torch.Tensor:
        """The tensor as stored, a view of the mapped file."""
        return self._mapped.tensor(self.info(name))

    def scale(self, name: str) -> torch.Tensor:
        """fp32 or e8m0 scales of an fp8 tensor, checked against its shape."""
        info = self.info(name)
        if scale_name(name) not in self.tensors:
            raise BadInput(
                f"{info.file}: {name} is stored in fp8 but no file has {scale_name(name)}: fetch the checkpoint again"
            )
        if len(info.shape) != 2:
            raise BadInput(
                f"{info.file}: {name} {list(info.shape)} is stored in fp8 but is no matrix: save one tensor per expert"
            )
        scale, wanted = self.info(scale_name(name)), scale_shape(info.shape, self.block)
        if scale.shape != wanted or not scale.dtype.is_floating_point:
            raise BadInput(
                f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, but {name} {list(info.shape)} "
                f"in blocks of {self.block[0]} x {self.block[1]} needs {list(wanted)}: fetch the checkpoint again"
            )
        return self._mapped.tensor(scale)

    def finite(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        """Some scales of an fp8 tensor, unchanged. Raises BadInput if one is NaN or infinite."""
        if not bool(torch.isfinite(scales.to(torch.float32)).all()):
            info = self.info(scale_name(name))
            raise BadInput(f"{info.file}: {info.name} holds NaN or infinity: fetch the checkpoint again")
        return scales

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A whole tensor, dequantised. Without `dtype`: bf16 for fp8 tensors, else as stored (a view of the file)."""
        return self.read(name, None, None, dtype)

    def read(
        self,
        name: str,
        start: Sequence[int] | None,
        size: Sequence[int] | None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A box of a tensor, as in `tensor`; reads only the pages under it (for fp8 those of its blocks)."""
        stored = self.stored(name)
        start = tuple(start or (0,) * stored.dim())
        size = tuple(stored.shape if size is None else size)
        if any(a < 0 or a + n > whole for a, n, whole in zip(start, size, stored.shape, strict=True)):
            raise ValueError(f"{name}: box {size} at {start} is outside the shape {tuple(stored.shape)}")
        if stored.dtype == torch.float8_e4m3fn:
            return self._dequantised(name, stored, start, size, dtype or torch.bfloat16)
        box = stored[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
        return box if dtype is None else box.to(dtype)

    def _dequantised(
        self, name: str, stored: torch.Tensor, start: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantise the blocks under the box, then cut to it."""
        scale, block = self.scale(name), self.block
        first = tuple(a // b for a, b in zip(start, block, strict=True))
        last = tuple(-(-(a + n) // b) for a, n, b in zip(start, size, block, strict=True))
        rows, columns = (slice(f * b, e * b) for f, e, b in zip(first, last, block, strict=True))
        scales = self.finite(name, scale[first[0] : last[0], first[1] : last[1]])
        values = dequantise(stored[rows, columns], scales, block, dtype=dtype)
        inner = tuple(slice(a - f * b, a - f * b + n) for a, n, f, b in zip(start, size, first, block, strict=True))
        return values[inner]

    def fingerprint(self) -> dict[str, Any]:
        """Identity of this checkpoint as JSON: place and dtype of every tensor, files, config."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"{name} {info.file.name} {info.dtype} {info.shape} {info.begin}\n".encode())
        for file in sorted({info.file for info in self.tensors.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode())
        return {"format": FORMAT, "source_sha256": digest.hexdigest()}

    def check(self, params: Iterable[Param]) -> None:
        """Compare all headers with a model's parameters; raises BadInput for the first tensor that does not fit."""
        check_names(self.path, self.tensors.keys())
        known: set[str] = set()
        for param in params:
            for part in param.parts:
                known.update((part.name, *part.aliases))
                self._check_part(part)
        for name, info in self.tensors.items():
            base = name.removesuffix(scale_name(""))
            if name in known or (base != name and base in known) or name.endswith(_IGNORED):
                continue
            raise BadInput(f"{info.file}: {name} is not a tensor of a {self.config.architecture} with this config.json")

    def _check_part(self, part: HFTensor) -> None:
        for name in (part.name, *(alias for alias in part.aliases if alias in self.tensors)):
            info = self.info(name)
            if info.shape != part.shape:
                raise BadInput(
                    f"{info.file}: {name} has the shape {list(info.shape)}, but config.json implies {list(part.shape)}"
                )
            if info.dtype == torch.float8_e4m3fn:
                self.scale(name)
            elif info.dtype not in _FLOATS:
                raise BadInput(
                    f"{info.file}: {name} has the type {info.dtype}: use a bf16, fp16, fp32 or block-fp8 checkpoint"
                )

    def close(self) -> None:
        """Release the mapped files."""
        self._mapped.close()


def _read_index(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX
    if not index.exists():
        if not (path / SINGLE).exists():
            raise BadInput(other_kind(path))
        return read_header(path / SINGLE)
    try:
        weight_map: Any = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{index} is not a valid index ({error}): fetch it again") from error
    headers = {}
    for name in files:
        if Path(name).name != name or len(name) > 255:
            raise BadInput(f"{index} names {name[:100]}, which is not a file of its folder: fetch it again")
        if not (path / name).exists():
            raise BadInput(f"{path / name} is missing, but {INDEX} names it: fetch the checkpoint again")
        headers[name] = read_header(path / name)
    tensors = {}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise BadInput(f"{path / file} lacks {name}, which {INDEX} places there: fetch it again")
        tensors[name] = headers[file][name]
    return tensors
