"""Growth of one trainer rank's memory with a model: `measured_growth.py CONFIG.json FLAGS…` prints bytes.

Uses the rank's real parts: Megatron's model, vime's optimizer after one step, and the reference copy. A small model
runs through the same steps first, so that imports and first calls are not counted.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vime.megatron.model import build_model
from vime.megatron.optimizer import Optimizer
from vime.megatron.parallel import init_parallel
from vime.megatron.reference import HostWeights
from vime.models.config import ModelConfig
from vime.recipe.load import load_recipe
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def trained(hf: dict[str, Any], recipe: Recipe) -> list[Any]:
    """A rank's long-lived parts after a step."""
    chunks = build_model(ModelConfig.from_hf(hf), ParallelLayout(), bf16=recipe.model.bf16)
    optimizer = Optimizer(chunks, recipe, total_steps=1)
    optimizer.reload_master_weights()
    reference = HostWeights(optimizer.chunks) if recipe.needs_reference else None
    optimizer.zero_grad()
    for chunk in optimizer.chunks:
        for parameter in chunk.module.parameters():
            parameter.main_grad.fill_(1e-3)
    assert not optimizer.step().skipped
    gc.collect()
    return [chunks, optimizer, reference]


if __name__ == "__main__":
    import socket

    hf, recipe = json.loads(Path(sys.argv[1]).read_text()), load_recipe("tiny-qwen3", sys.argv[2:])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init_parallel(ParallelLayout(), rank=0, master_address="127.0.0.1", master_port=port)
    small = trained(
        {**hf, "num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}, recipe
    )
    before = anonymous_bytes()
    kept = trained(hf, recipe)
    print(anonymous_bytes() - before)
