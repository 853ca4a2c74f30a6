"""Random shapes and layouts: what the model allows converts and loads bit by bit, the rest is refused beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import tiny_hf
from vime.checkpoint.convert import TIMEOUT, convert, verify
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.load import read_shard
from vime.checkpoint.ranks import Ranks, process_group
from vime.checkpoint.torch_dist import TorchDistReader
from vime.errors import BadInput
from vime.models.families import params_of
from vime.models.shards import check_layout, holds, tensor_split
from vime.recipe.parallel import ParallelLayout

SIZES = st.integers(1, 60).map(lambda n: 5 * n)
"""Most are no multiples of 16 or 128."""


@st.composite
def models(draw: Callable) -> dict[str, Any]:
    """A small model of any family, in block fp8 with edge blocks where the family's checkpoints are."""
    layers, width = (
        draw(st.integers(1, 5)),
        {"hidden_size": draw(SIZES), "intermediate_size": 12 * draw(st.integers(1, 9))},
    )
    width |= {"num_hidden_layers": layers, "vocab_size": draw(st.integers(30, 150))}
    family = draw(st.sampled_from(["deepseek", "moonlight", "qwen3", "qwen3-moe", "llama"]))
    if family in ("deepseek", "moonlight"):
        rank = draw(SIZES) if family == "deepseek" else None
        hf = {**tiny_hf.DEEPSEEK, **width, "q_lora_rank": rank, "kv_lora_rank": draw(SIZES)}
        hf |= {
            "moe_intermediate_size": 12 * draw(st.integers(1, 9)),
            "first_k_dense_replace": draw(st.integers(0, layers)),
        }
        hf["num_nextn_predict_layers"] = 1 if family == "deepseek" else 0
        return tiny_hf.with_fp8(hf, draw(st.sampled_from([(16, 16), (128, 128), (24, 40)])))
    base = {"qwen3": tiny_hf.QWEN3, "qwen3-moe": tiny_hf.QWEN3_MOE, "llama": tiny_hf.LLAMA}[family]
    return {**base, **width, "head_dim": 2 * draw(st.integers(1, 20))}


@st.composite
def layouts(draw: Callable) -> ParallelLayout:
    """Any layout of up to some dozens of ranks, whether a model allows it or not."""
    tp, pp, ep, etp = (draw(st.sampled_from(sizes)) for sizes in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 8], [1, 2]))
    ends = {name: draw(st.none() | st.integers(1, 3)) for name in ("first_stage_layers", "last_stage_layers")}
    return ParallelLayout(world_size=tp * pp * ep * etp, tp=tp, pp=pp, ep=ep, etp=etp, **(ends if pp > 1 else {}))


def is_allowed(hf: dict[str, Any], layout: ParallelLayout) -> bool:
    """The user's expectation in plain numbers: everything that is cut divides, and every stage has layers."""
    moe = hf.get("n_routed_experts") or hf.get("num_experts")
    if any(hf[name] % layout.tp for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")):
        return False
    if moe and (moe % layout.ep or hf["moe_intermediate_size"] % layout.etp):
        return False
    if hf.get("n_shared_experts") and hf["moe_intermediate_size"] % layout.tp:
        return False
    if hf.get("num_nextn_predict_layers") and hf["hidden_size"] % layout.tp:
        return False
    if not moe and (layout.ep > 1 or layout.etp > 1):
        return False
    given = [layers for layers in (layout.first_stage_layers, layout.last_stage_layers) if layers is not None]
    left, stages = hf["num_hidden_layers"] - sum(given), layout.pp - len(given)
    return left == 0 if stages == 0 else left > 0 and left % stages == 0


@pytest.mark.e2e
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hf=models(), layout=layouts(), seed=st.integers(0, 9))
def test_any_model_at_any_layout(tmp_path_factory: pytest.TempPathFactory, hf, layout, seed) -> None:
    folder: Path = tmp_path_factory.mktemp("layout")
    source = tiny_hf.write_checkpoint(folder / "hf", hf, files=2, seed=seed)
    checkpoint = HFCheckpoint(source)
    if not is_allowed(hf, layout):
        with pytest.raises(BadInput):
            convert(checkpoint, folder / "save", layout, 0)
        assert not (folder / "save").exists()
        return
    check_layout(checkpoint.config, layout)
    with process_group(Ranks(), TIMEOUT):
        convert(checkpoint, folder / "save", ParallelLayout(), 0, file_bytes=50_000)
    # The boxes of this layout, read from both sides.
    for rank in range(layout.world_size):
        verify(checkpoint, folder / "save", layout, rank)
    # The direct start: the shards of all ranks hold the numbers of the torch_dist, each once.
    reader = TorchDistReader(folder / "save", checkpoint.config)
    for param in params_of(checkpoint.config)[seed::5]:
        shards = {}
        for coords in map(layout.coordinates, range(layout.world_size)):
            if holds(param, checkpoint.config, layout, coords):
                index = tensor_split(param, layout, coords)[0]
                shards[index] = read_shard(checkpoint, param, layout, coords).float().flatten()
        found, whole = torch.cat(list(shards.values())).sort().values, reader.read(param).float().flatten()
        padding = torch.zeros(found.numel() - whole.numel())
        assert torch.equal(found, torch.cat([whole, padding]).sort().values), param.name
