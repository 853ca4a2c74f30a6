"""The plan's parameter counts of every rank equal those of the Megatron model, built on the meta device."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import patience
from tests.support.hf_configs import DEEPSEEK_R1, MOONLIGHT, QWEN3_4B, QWEN3_30B_A3B
from vime.models.config import ModelConfig
from vime.planning.counts import Kind, stage_parts, summed
from vime.recipe.parallel import ParallelLayout

pytestmark = pytest.mark.e2e


def layout(world_size: int, **sizes: Any) -> ParallelLayout:
    return ParallelLayout(world_size=world_size, sequence_parallel=sizes.get("tp", 1) > 1, **sizes)


CASES: dict[str, tuple[dict[str, Any], ParallelLayout, bool]] = {
    "R1, the recipe": (DEEPSEEK_R1, layout(128, tp=8, cp=4, pp=4, ep=32, last_stage_layers=13), False),
    "R1, training MTP": (DEEPSEEK_R1, layout(128, tp=8, cp=4, pp=4, ep=32, last_stage_layers=13), True),
    "R1, the conversion": (DEEPSEEK_R1, layout(32, pp=8, ep=4, first_stage_layers=7, last_stage_layers=6), False),
    "R1, expert tensors cut": (DEEPSEEK_R1, layout(256, tp=4, pp=8, ep=16, etp=2, last_stage_layers=5), False),
    "Moonlight": (MOONLIGHT, layout(8, tp=2, ep=4), False),
    "Qwen3 MoE": (QWEN3_30B_A3B, layout(8, tp=4, ep=8), False),
    "Qwen3 MoE in stages": (QWEN3_30B_A3B, layout(16, tp=2, pp=2, ep=4, etp=2), False),
    "Qwen3 MoE, replicas": (QWEN3_30B_A3B, layout(64, pp=8, ep=4), False),
    "Qwen3 on one rank": (QWEN3_4B, layout(1), False),
    "Qwen3, TP8": (QWEN3_4B, layout(8, tp=8), False),
    "Qwen3, tied over stages": (QWEN3_4B, layout(12, tp=2, pp=3, cp=2), False),
}


def ranks_of(hf: dict[str, Any], sizes: ParallelLayout, mtp: bool) -> list[int]:
    """The last rank, and the first one of every pipeline stage that differs from those before it."""
    per_stage = sizes.world_size // sizes.pp
    stages = [summed(parts) for parts in stage_parts(ModelConfig.from_hf(hf), sizes, mtp=mtp)]
    return sorted({*(per_stage * stages.index(counts) for counts in stages), sizes.world_size - 1})


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, dict[str, int]]]:
    """Per case and rank, the elements of every parameter of Megatron's model."""
    cases = [
        {"hf": hf, "layout": dataclasses.asdict(sizes), "mtp": mtp, "ranks": ranks_of(hf, sizes, mtp)}
        for hf, sizes, mtp in CASES.values()
    ]
    script = Path(__file__).parents[1] / "support" / "meta_model.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=patience.TRAINING,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_what_the_plan_says(built: dict[str, dict[str, dict[str, int]]], case: str):
    hf, sizes, mtp = CASES[case]
    stages = stage_parts(ModelConfig.from_hf(hf), sizes, mtp=mtp)
    for rank, parameters in built[case].items():
        planned = stages[sizes.coordinates(int(rank)).pp]
        assert summed(planned).of_rank(sizes) == sum(parameters.values()), f"rank {rank}"


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_parameter_agrees(built: dict[str, dict[str, dict[str, int]]], case: str):
    hf, sizes, mtp = CASES[case]
    stages = stage_parts(ModelConfig.from_hf(hf), sizes, mtp=mtp)
    for rank, parameters in built[case].items():
        planned = stages[sizes.coordinates(int(rank)).pp]
        found: dict[str, int] = {}
        for name, elements in parameters.items():
            kind = kind_of_name(name)
            found[kind] = found.get(kind, 0) + elements
        assert found == {kind: n for kind, counts in planned.items() if (n := counts.of_rank(sizes))}, f"rank {rank}"


def kind_of_name(name: str) -> Kind:
    """The kind of a parameter by Megatron's own name for it."""
    marks = {
        "mtp.": Kind.MTP, "embedding.": Kind.EMBEDDING, ".experts.": Kind.ROUTED, ".router.": Kind.ROUTER,
        ".shared_experts.": Kind.SHARED, "layernorm": Kind.NORM, "output_layer": Kind.HEAD,
        "self_attention": Kind.ATTENTION, ".mlp.": Kind.DENSE,
    }  # fmt: skip
    return next(kind for mark, kind in marks.items() if mark in name)
