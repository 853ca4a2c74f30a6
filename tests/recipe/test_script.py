"""Launch scripts in the style of other trainers, read without running them."""

from __future__ import annotations

from pathlib import Path

import pytest

from vime import submit
from vime.errors import BadInput
from vime.recipe.load import load_recipe
from vime.recipe.script import read_script

MODEL = """
NLAYERS=61
MOE_LAYER_FREQ="$(python3 -c 'print([0]*3 + [1]*58)')"
MODEL_ARGS=(
   --num-layers ${NLAYERS}
   --rotary-base 10000  # the base
   --moe-layer-freq $MOE_LAYER_FREQ
   --no-masked-softmax-fusion
)
"""
DEEPSEEK = """#!/bin/bash
pkill -9 ray; touch HARM
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/deepseek.sh"
CKPT_ARGS=(
   --hf-checkpoint $BASE_DIR/DeepSeek-R1/
   #--hf-checkpoint $BASE_DIR/DeepSeek-R1-bf16/
   --ref-load $BASE_DIR/DeepSeek-R1_torch_dist/
)
OPTIMIZER_ARGS=(--optimizer adam --lr 1e-6)
ROLLOUT_ARGS=(
   --prompt-data $BASE_DIR/dapo.jsonl
   --rm-type deepscaler
   --balance-data
   --dynamic-sampling-filter-path slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std
)
UNUSED_ARGS=(--lr 5)
ray job submit --address="http://127.0.0.1:8265" \\
   --runtime-env-json="${RUNTIME_ENV_JSON}" \\
   -- python3 train.py \\
   --actor-num-nodes 16 \\
   --colocate \\
   ${MODEL_ARGS[@]} \\
   ${CKPT_ARGS[@]} ${OPTIMIZER_ARGS[@]} \\
   ${ROLLOUT_ARGS[@]}
"""
SGLANG = """
LR=2e-6
SGLANG_ARGS=(--sglang-mem-fraction-static 0.7 --sglang-router-ip 10.0.0.1)
WANDB_ARGS=(--use-wandb --wandb-group g --wandb-key ${WANDB_KEY})
RM_ARGS=(--rm-type remote_rm --rm-url http://host:8000/ --group-rm)
CRITIC_ARGS=(--critic-num-nodes 1)
python3 train.py --lr $LR ${SGLANG_ARGS[@]} ${WANDB_ARGS[@]} ${RM_ARGS[@]} ${CRITIC_ARGS[@]}
"""
PLAIN = """
GRPO_ARGS=(
   --advantage-estimator grpo --eps-clip 0.2
   --vllm-speculative-config '{"method": "mtp", "num_speculative_tokens": 2}'
)
EXTRA_ARGS=(--seed `date +%s`)
"""


def test_a_script_with_a_sourced_model_amounts_to_a_recipe(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "deepseek.sh").write_text(MODEL)
    (tmp_path / "run.sh").write_text(DEEPSEEK)
    assert submit.main(["--from-script", "run.sh", "--dry-run", "--write-recipe", "mine.yaml"]) == 0
    recipe = load_recipe("./mine.yaml")
    assert recipe.checkpoint.hf_checkpoint == "$BASE_DIR/DeepSeek-R1/"
    assert (recipe.resources.actor_num_nodes, recipe.resources.colocate) == (16, True)
    assert (recipe.optimizer.lr, recipe.model.model_args) == (1e-6, {"num_layers": 61, "rotary_base": 10000})
    assert recipe.rollout.dynamic_sampling_filter_path == "check_reward_nonzero_std"
    said = capsys.readouterr().out
    assert "deepseek.sh:3: MOE_LAYER_FREQ=" in said
    assert "--balance-data: the shares of the data-parallel ranks" in said
    assert "--no-masked-softmax-fusion: vime chooses" in said
    assert not (tmp_path / "HARM").exists()
    assert submit.main(["--from-script", "run.sh", "--write-recipe", "mine.yaml"]) == 2


def test_flags_of_another_engine_are_renamed_and_what_is_not_built_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(SGLANG)
    script = read_script(tmp_path / "run.sh")
    assert ("--sglang-mem-fraction-static", "--vllm-gpu-memory-utilization") in script.renamed
    assert ("remote_rm", "remote") in script.renamed
    assert [name for name, _ in script.not_built] == ["--critic-num-nodes"]
    assert {"--group-rm", "--sglang-router-ip"} <= {name for name, _ in script.without_meaning}
    assert script.flags[:2] == ["--lr", "2e-6"] or "2e-6" in script.flags
    assert not [word for word in script.flags if "WANDB_KEY" in word]


def test_a_script_of_arrays_alone_is_read_and_substitutions_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(PLAIN)
    script = read_script(tmp_path / "run.sh")
    assert '{"method": "mtp", "num_speculative_tokens": 2}' in script.flags
    assert any(where == "run.sh:6" for where, _ in script.unread)
    assert "--seed" not in script.flags


def test_a_file_that_is_no_launch_script_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sh").write_text("echo hello\n")
    with pytest.raises(BadInput, match="neither arrays of flags"):
        read_script(tmp_path / "x.sh")
    with pytest.raises(BadInput, match="cannot read the script"):
        read_script(tmp_path / "none.sh")
