"""Megatron computes what transformers computes, and its own loader reads what the conversion writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import patience, tiny_hf
from tests.support.torchrun import TOOL, torchrun
from vime.checkpoint.convert import main as convert
from vime.checkpoint.export import export

HERE = Path(__file__).parents[1] / "support"
pytestmark = pytest.mark.e2e

YARN = tiny_hf.DEEPSEEK
MODELS = {
    "deepseek-yarn": YARN,
    "deepseek-plain": {k: v for k, v in YARN.items() if k != "rope_scaling"},
    "moonlight": {
        **{k: v for k, v in YARN.items() if k != "rope_scaling"},
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 2,
        "num_nextn_predict_layers": 0,
        "rope_theta": 50000.0,
    },
    "qwen3": tiny_hf.QWEN3,
    "qwen3-moe": tiny_hf.QWEN3_MOE,
    "qwen3-moe-unnormalised": {**tiny_hf.QWEN3_MOE, "norm_topk_prob": False},
    "llama": tiny_hf.LLAMA,
    "llama-scaled": {
        **tiny_hf.LLAMA,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}

# One a family; Megatron's own loader reads what the conversion makes of them.
CONVERTED = ("qwen3", "qwen3-moe", "moonlight", "llama")


def run(script: str, *arguments: str) -> None:
    """In a process of its own: on a CPU the trainer changes parts of torch that transformers uses too."""
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience.GROUP, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    base = tmp_path_factory.mktemp("models")
    made = {name: tiny_hf.write_checkpoint(base / name, hf, dtype=torch.float32) for name, hf in MODELS.items()}
    # fp8, its bf16 twin for transformers, and a torch_dist written by four ranks.
    fp8 = tiny_hf.write_checkpoint(base / "fp8", tiny_hf.with_fp8(YARN))
    layout = ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]
    torchrun(4, str(TOOL), *layout, "--hf-checkpoint", str(fp8), "--save", str(base / "fp8_torch_dist"))
    export(base / "fp8_torch_dist", fp8, base / "bf16")
    for name in CONVERTED:
        assert convert(["--hf-checkpoint", str(made[name]), "--save", str(base / f"{name}_torch_dist")]) == 0
    return {
        **{name: str(path) for name, path in made.items()},
        "fp8": str(fp8),
        "bf16": str(base / "bf16"),
        **{f"{name}_torch_dist": str(base / f"{name}_torch_dist") for name in ("fp8", *CONVERTED)},
    }


@pytest.fixture(scope="module")
def logits(folders, tmp_path_factory) -> dict[str, torch.Tensor]:
    """By folder for transformers (`hf:`) and Megatron."""
    out = tmp_path_factory.mktemp("logits")
    run("hf_process.py", str(out / "hf.pt"), *(folders[name] for name in (*MODELS, "bf16")))
    converted = [f"{folders[name]}@{folders[name + '_torch_dist']}" for name in ("fp8", *CONVERTED)]
    run("megatron_process.py", "logits", str(out / "mg.pt"), *(folders[n] for n in (*MODELS, "fp8")), *converted)
    hf = {f"hf:{folder}": values for folder, values in torch.load(out / "hf.pt").items()}
    return {**hf, **torch.load(out / "mg.pt")}


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(folders, logits, name):
    ours, theirs = logits[folders[name]], logits[f"hf:{folders[name]}"]
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() < 1e-4


def test_fp8_loads_directly_with_the_logits_of_its_bf16_twin(folders, logits):
    assert (logits[folders["fp8"]] - logits[f"hf:{folders['bf16']}"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["fp8", *CONVERTED])
def test_a_conversion_loads_in_one_process_with_the_same_logits(folders, logits, name):
    assert torch.equal(logits[f"{folders[name]}@{folders[name + '_torch_dist']}"], logits[folders[name]])


def test_megatrons_loader_reads_it_at_another_layout(folders):
    """Written at PP2 x EP2, read at TP2 x PP2 x EP2, MTP layers too."""
    torchrun(4, str(HERE / "megatron_process.py"), "compare", folders["fp8_torch_dist"], folders["fp8"], "2", "2", "2")
