"""One-process models for tests: built once per model, filled with random weights by name."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import torch

from tests.support import tiny_hf
from vime.megatron import model, parallel
from vime.models import local as naming
from vime.models.config import ModelConfig
from vime.models.transform import shard_parts
from vime.recipe.parallel import ParallelLayout

MODELS: dict[str, dict[str, Any]] = {
    "deepseek": tiny_hf.DEEPSEEK,
    "qwen3": tiny_hf.QWEN3,
    "qwen3_moe": tiny_hf.QWEN3_MOE,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fill_from(chunks: list[Any], hf: dict[str, Any], layout: ParallelLayout, rank: int = 0) -> None:
    """Random weights that depend on the model alone, not on the layout."""
    config, coords = ModelConfig.from_hf(hf), layout.coordinates(rank)
    tensors = tiny_hf.random_tensors(hf, dtype=torch.float32)
    locals_ = naming.local_tensors(chunks, config, layout, coords)
    naming.fill(locals_, lambda param: shard_parts(param, tensors, layout, coords))


@contextlib.contextmanager
def one_process() -> Iterator[ParallelLayout]:
    """Megatron's groups of a single rank."""
    layout = ParallelLayout()
    parallel.init_parallel(layout, rank=0, master_address="127.0.0.1", master_port=free_port())
    try:
        yield layout
    finally:
        parallel.destroy_parallel()


def built(hf: dict[str, Any], layout: ParallelLayout, **options: Any) -> list[Any]:
    chunks = model.build_model(ModelConfig.from_hf(hf), layout, bf16=False, **options)
    fill_from(chunks, hf, layout)
    return chunks
