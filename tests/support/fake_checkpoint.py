"""A base folder as the recipes expect it, with the checkpoint's files but without meaningful weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vime.recipe import files


def write_shard(path: Path, tensors: dict[str, int]) -> None:
    """A safetensors file of byte tensors of these lengths, all zero."""
    header, position = {}, 0
    for name, length in tensors.items():
        header[name] = {"dtype": "U8", "shape": [length], "data_offsets": [position, position + length]}
        position += length
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(position))


def write_checkpoint(folder: Path, config: dict[str, Any]) -> Path:
    """An HF folder with two shards and an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    shards = {"model-00001-of-00002.safetensors": {"a": 16, "b": 8}, "model-00002-of-00002.safetensors": {"c": 32}}
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    """$BASE_DIR for the tiny recipes."""
    base = tmp_path / "base"
    for model in ("tiny-deepseek-r1", "tiny-qwen3"):
        write_checkpoint(base / model, files.read(files.find("models", model)))
    (base / "tiny-math").mkdir()
    for name in ("train", "eval"):
        (base / "tiny-math" / f"{name}.jsonl").write_text('{"prompt": "1+1=", "label": "2"}\n')
    return base


@pytest.fixture
def change_config(base_dir: Path) -> Callable[..., Path]:
    """Rewrites the tiny checkpoint's config.json with some values replaced; returns its folder."""

    def change(**values: Any) -> Path:
        file = base_dir / "tiny-deepseek-r1" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return file.parent

    return change
