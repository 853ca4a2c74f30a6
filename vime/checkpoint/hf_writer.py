"""Writing an HF checkpoint folder: sharded safetensors with an index, by several ranks, one rename at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vime.checkpoint.hf import INDEX, SINGLE
from vime.checkpoint.safetensors_file import Spec, TensorInfo, layout, raw_bytes
from vime.errors import BadInput
from vime.system.files import READABLE, publish_folder, require_space, write_at, write_json

MAX_SHARD_BYTES = 5 * 10**9
# Not copied from a source folder: weights in any format, and leftovers of a download.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".msgpack", ".h5", ".onnx")


class HFWriter:
    """Writes `specs` to a temporary folder next to `path`, renamed by `publish`. Until then nothing looks complete.

    The first rank calls `create()`; then all ranks write into the same files, in any order, each tensor by exactly one
    rank.
    """

    def __init__(self, path: str | Path, specs: Sequence[Spec], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self._headers: dict[str, bytes] = {}
        self.places: dict[str, TensorInfo] = {}
        self.total_bytes = sum(spec.bytes for spec in specs)
        groups = _groups(specs, max_shard_bytes)
        for number, group in enumerate(groups, 1):
            name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._headers[name], places = layout(self.partial / name, group)
            self.places.update(places)
        self._files: dict[Path, int] = {}

    def create(self) -> None:
        """Check target and disk space, then make the temporary folder with all files at full size."""
        require_empty(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        require_space(self.path.parent, self.total_bytes)
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir()
        ends = {name: len(header) for name, header in self._headers.items()}
        for info in self.places.values():
            ends[info.file.name] = max(ends[info.file.name], info.end)
        for name, header in self._headers.items():
            with (self.partial / name).open("wb") as stream:
                stream.write(header)
                stream.truncate(ends[name])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, converted to the announced dtype."""
        info = self.places[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, announced {info.shape}")
        file = self._files.get(info.file)
        if file is None:
            file = self._files[info.file] = os.open(info.file, os.O_WRONLY)
        write_at(file, raw_bytes(tensor.to(info.dtype)), info.begin)

    def close(self) -> None:
        """Sync this rank's bytes to disk and close the files; every rank calls it before `publish`."""
        for file in self._files.values():
            os.fsync(file)
            os.close(file)
        self._files.clear()

    def publish(self, *, copy_from: Path | None = None, config: dict[str, Any] | None = None) -> None:
        """Add the index, `copy_from`'s tokenizer and other small files, and `config.json`; then rename the folder."""
        self.close()
        if len(self._headers) > 1:
            weight_map = {name: info.file.name for name, info in self.places.items()}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.partial / INDEX, index, mode=READABLE)
        if copy_from is not None:
            copy_small_files(copy_from, self.partial)
        if config is not None:
            write_json(self.partial / "config.json", config, mode=READABLE)
        publish_folder(self.partial, self.path)


def copy_small_files(source: Path, target: Path) -> None:
    """Copy an HF folder's files other than weights: config, tokenizer, generation settings, code, licence."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, target / file.name)


def require_empty(path: Path) -> None:
    """Raise BadInput for a target that exists and is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"{path} exists and is not empty: give a new folder or remove it")


def _groups(specs: Iterable[Spec], max_bytes: int) -> list[list[Spec]]:
    groups: list[list[Spec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.bytes
    return groups
