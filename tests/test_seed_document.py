"""Every command of the document that vime started from that speaks to vime's tools, letter by letter.

The blocks stand here as they stand there; `...` is where the document leaves flags out. `torchrun` is a script that
writes down its words: 32 ranks on four nodes are more than a test has. Downloads and `ray start` are other programs'.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import hf_configs, patience, tiny_hf
from tests.support.fake_checkpoint import write_checkpoint
from vime.checkpoint.convert import ignored_flags, read_arguments
from vime.recipe.load import load_recipe, load_with_notes
from vime.recipe.script import read_script

ROOT = Path(__file__).parents[1]
CAST = """
cd vime/
python tools/fp8_cast_bf16.py --input-fp8-hf-path $BASE_DIR/DeepSeek-R1 --output-bf16-hf-path $BASE_DIR/DeepSeek-R1-bf16/
"""  # noqa: E501
CONVERT = r"""
cd vime/
source scripts/models/deepseek-v3.sh
PYTHONPATH=/root/Megatron-LM/ torchrun \
   --nproc-per-node 8 \
   --master-addr ${MASTER_ADDR} --master-port 12345 \
   --nnodes=4 --node-rank ${NODE_RANK} \
   tools/convert_hf_to_torch_dist.py \
   ${MODEL_ARGS[@]} \
   --tensor-model-parallel-size 1 \
   --pipeline-model-parallel-size 8 \
   --expert-tensor-parallel-size 1 \
   --expert-model-parallel-size 4 \
   --decoder-first-pipeline-num-layers 7 \
   --decoder-last-pipeline-num-layers 6 \
   --hf-checkpoint $BASE_DIR/DeepSeek-R1-bf16/ \
   --save $BASE_DIR/DeepSeek-R1_torch_dist/
"""
TRAIN = """
cd vime/
bash scripts/run-deepseek-r1.sh
"""
MODEL = """
SCRIPT_DIR="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"
source "${SCRIPT_DIR}/models/deepseek-v3.sh"
"""
ARRAYS = {
    "CKPT_ARGS": """
CKPT_ARGS=(
   # HF ckpt required by vllm, we also read the tokenizer from here
   --hf-checkpoint $BASE_DIR/DeepSeek-R1/
   #--hf-checkpoint $BASE_DIR/DeepSeek-R1-bf16/
   --ref-load $BASE_DIR/DeepSeek-R1_torch_dist/
   # Actor's load directory, if empty, it will read from `ref_load`
   --load $BASE_DIR/DeepSeek-R1_vime/
   --save $BASE_DIR/DeepSeek-R1_vime/
   --save-interval 20
)
""",
    "PERF_ARGS": """
PERF_ARGS=(
   --tensor-model-parallel-size 8
   --sequence-parallel
   --pipeline-model-parallel-size 4
   --context-parallel-size 4
   --expert-model-parallel-size 32
   --expert-tensor-parallel-size 1
   --decoder-last-pipeline-num-layers 13

   --recompute-granularity full
   --recompute-method uniform
   --recompute-num-layers 1

   --use-dynamic-batch-size
   --max-tokens-per-gpu 16384
)
""",
    "GRPO_ARGS": """
GRPO_ARGS=(
   --advantage-estimator grpo
   --use-kl-loss
   --kl-loss-coef 0.00
   --kl-loss-type low_var_kl
   --entropy-coef 0.00
   --eps-clip 0.2
   --eps-clip-high 0.28
)
""",
    "OPTIMIZER_ARGS": """
OPTIMIZER_ARGS=(
   ...

   --optimizer-cpu-offload
   --overlap-cpu-optimizer-d2h-h2d
   --use-precision-aware-optimizer
)
""",
    "VLLM_ARGS": """
VLLM_ARGS=(
   --rollout-num-gpus-per-engine 64
   --vllm-gpu-memory-utilization 0.7
   --vllm-enable-expert-parallel

   # dp attention
   --vllm-data-parallel-size 8

    # enable deepep for vllm

    # mtp

    # make every dp rank has 128 concurrency
    --vllm-server-concurrency 1024
    --vllm-speculative-config '{"method":"eagle","num_speculative_tokens":4}'
)
""",
    "MISC_ARGS": """
MISC_ARGS=(
   ...

   # use deepep for megatron
   --moe-enable-deepep
   --moe-token-dispatcher-type flex
)
""",
}
RECORDER = """#!/bin/bash
printf '%s\\0' "PYTHONPATH=$PYTHONPATH" "$@" > "$RECORD"
"""


def whole(block: str) -> str:
    """The block without the lines that stand for flags left out."""
    return "\n".join(line for line in block.splitlines() if line.strip() != "...")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a block in bash, in a folder that holds the checkout as `vime/`, with this Python and a fake torchrun."""
    programs, place = tmp_path / "bin", tmp_path / "place"
    programs.mkdir()
    place.mkdir()
    (place / "vime").symlink_to(ROOT)
    (programs / "python").symlink_to(sys.executable)
    (programs / "torchrun").write_text(RECORDER)
    (programs / "torchrun").chmod(0o755)
    base = tmp_path / "base"
    base.mkdir()
    env = {
        **os.environ, "PATH": f"{programs}:/usr/bin:/bin", "BASE_DIR": str(base), "RECORD": str(tmp_path / "record"),
        "MASTER_ADDR": "10.0.0.1", "NODE_RANK": "2", "XDG_STATE_HOME": str(tmp_path / "state"),
    }  # fmt: skip
    # A link to Python outside of its environment would not find the environment's packages.
    (programs / "python").unlink()
    (programs / "python").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    (programs / "python").chmod(0o755)

    def run(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", text], env=env, cwd=place, capture_output=True, text=True, timeout=patience.PROCESS
        )

    return run


def test_the_cast_command(shell, tmp_path: Path) -> None:
    tiny_hf.write_checkpoint(tmp_path / "base" / "DeepSeek-R1", tiny_hf.with_fp8(tiny_hf.DEEPSEEK), files=2)
    done = shell(CAST)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "base" / "DeepSeek-R1-bf16"
    assert json.loads((made / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLM"]
    kinds = {str(value.dtype) for file in made.glob("*.safetensors") for value in load_file(file).values()}
    assert kinds == {"torch.bfloat16", "torch.float32"}


def test_the_conversion_command_on_a_node(shell, tmp_path: Path) -> None:
    bf16 = {name: value for name, value in hf_configs.DEEPSEEK_R1.items() if name != "quantization_config"}
    write_checkpoint(tmp_path / "base" / "DeepSeek-R1-bf16", bf16)
    done = shell(CONVERT)
    assert done.returncode == 0, done.stderr
    path, *words = (tmp_path / "record").read_text().rstrip("\0").split("\0")
    assert path == "PYTHONPATH=/root/Megatron-LM/"
    tool = words.index("tools/convert_hf_to_torch_dist.py")
    meeting = "--nproc-per-node 8 --master-addr 10.0.0.1 --master-port 12345 --nnodes=4 --node-rank 2"
    assert words[:tool] == meeting.split()
    checkpoint, save, layout = read_arguments(words[tool + 1 :], world_size=32)
    assert (layout.world_size, layout.pp, layout.ep, layout.tp) == (32, 8, 4, 1)
    assert [len(layers) for layers in layout.stage_layers(checkpoint.config.num_layers)] == [7, *[8] * 6, 6]
    assert save == tmp_path / "base" / "DeepSeek-R1_torch_dist"
    assert ignored_flags(words[tool + 1 :]) == []


def test_the_training_command_asks_for_what_the_document_describes(shell) -> None:
    """With `--dry-run`: what it submits is shown, and no Slurm is needed."""
    done = shell(TRAIN.rstrip() + " --dry-run\n")
    assert done.returncode == 0, done.stderr
    for text in ("128 ranks, TP8 x CP4 x DP1 x PP4", "DP8 x TP8, expert parallel", "#SBATCH --nodes=16"):
        assert text in done.stdout


def test_the_training_script_holds_the_documents_flags() -> None:
    script = (ROOT / "scripts" / "run-deepseek-r1.sh").read_text()
    for name, block in ARRAYS.items():
        wanted = [line.strip() for line in whole(block).splitlines() if line.strip().startswith("--")]
        mine = re.search(rf"^{name}=\(\n(.*?)^\)", script, re.MULTILINE | re.DOTALL)
        assert mine is not None
        own = [line.strip() for line in mine[1].splitlines() if line.strip()]
        # The draft of the checkpoint is its own layer for multi-token prediction, as the recipe says.
        assert own == [line for line in wanted if "speculative" not in line], name


def test_the_arrays_are_flags_of_a_submission(shell, tmp_path: Path) -> None:
    arrays = "".join(whole(block) for block in ARRAYS.values())
    given = " ".join(f'"${{{name}[@]}}"' for name in ("MODEL_ARGS", *ARRAYS))
    sourced = MODEL.replace('"$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" &>/dev/null && pwd)"', "scripts")
    done = shell(f"cd vime/\n{sourced}\n{arrays}\npython -m vime.submit --nodes 16 --dry-run -- {given}\n")
    assert done.returncode == 0, done.stderr
    assert "128 ranks, TP8 x CP4 x DP1 x PP4" in done.stdout


def test_the_arrays_alone_amount_to_the_recipe() -> None:
    words = shlex.split("\n".join(whole(block) for block in ARRAYS.values()), comments=True)
    flags = [word for word in words if not word.endswith("_ARGS=(") and word != ")"]
    given, recipe = load_with_notes("deepseek-r1", flags).recipe, load_recipe("deepseek-r1")
    assert given.perf == recipe.perf
    assert given.optimizer == recipe.optimizer
    assert given.misc == recipe.misc
    assert given.algorithm == recipe.algorithm
    assert given.engine.vllm["data_parallel_size"] == 8


def test_a_script_of_the_documents_blocks_is_read_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "deepseek-v3.sh").write_text("MODEL_ARGS=(--num-layers 61)\n")
    names = " ".join(f"${{{name}[@]}}" for name in ("MODEL_ARGS", *ARRAYS))
    text = MODEL + "".join(whole(block) for block in ARRAYS.values())
    text += (
        f"\nray job submit -- python3 train.py --actor-num-nodes 16 --actor-num-gpus-per-node 8 --colocate {names}\n"
    )
    (tmp_path / "run-deepseek-r1.sh").write_text(text)
    script = read_script(tmp_path / "run-deepseek-r1.sh")
    assert script.flags[script.flags.index("--decoder-last-pipeline-num-layers") + 1] == "13"
    assert '{"method":"eagle","num_speculative_tokens":4}' in script.flags
    assert not script.not_built
    assert not script.unread
