"""The host-memory account of a trainer rank, held against a real one of half a billion parameters on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from vime.models.config import ModelConfig
from vime.planning.counts import model_counts
from vime.planning.memory import Weights, node_memory
from vime.recipe.load import load_recipe
from vime.recipe.parallel import ParallelLayout
from vime.run.plan import TrainerRank

pytestmark = pytest.mark.e2e

HALF_A_BILLION = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 4096,
    "tie_word_embeddings": False, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip
MODEL_ITEMS = ("weights", "gradients", "adam", "reference_copy")


@pytest.mark.parametrize("flags", [("--bf16", "--use-kl-loss"), ("--no-bf16", "--no-use-kl-loss")])
def test_a_rank_grows_by_what_the_plan_says(tmp_path: Path, flags: tuple[str, ...]):
    config = ModelConfig.from_hf(HALF_A_BILLION)
    assert model_counts(config).total > 0.5e9
    recipe = load_recipe("tiny-qwen3", flags)
    rank = TrainerRank(rank=0, node=0, gpu=0, tp=0, cp=0, dp=0, pp=0, ep=0, etp=0, edp=0)
    account = node_memory(recipe, config, Weights.of(recipe, config, ParallelLayout()), [rank], [], 0)
    planned = {item.name: item.bytes for item in account.items if item.name in MODEL_ITEMS}
    assert ("reference_copy" in planned) == ("--use-kl-loss" in flags)
    (tmp_path / "config.json").write_text(json.dumps(HALF_A_BILLION))
    command = [sys.executable, "-W", "ignore", str(Path(__file__).parents[1] / "support" / "measured_growth.py")]
    done = subprocess.run(
        [*command, str(tmp_path / "config.json"), *flags], capture_output=True, text=True, timeout=patience.TRAINING
    )
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(done.stdout.split()[-1])
    print(f"{' '.join(flags)}: planned {sum(planned.values()):,}, measured {measured:,}")
    assert measured == pytest.approx(sum(planned.values()), rel=0.05)
