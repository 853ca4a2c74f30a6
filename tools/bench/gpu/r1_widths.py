"""The whole chain at DeepSeek-R1's own widths on one GPU: block fp8, MTP drafts, long answers.

    python tools/bench/gpu/r1_widths.py --folder DIR [--layers 2] [--experts 16] [--make] [-- recipe flags]

Makes a checkpoint of R1's shape (hidden 7168, 128 heads of latent attention, its dense and expert sizes, vocabulary and
MTP layer; random weights in block fp8) with as many layers and experts as fit, and runs vime on it: cast and conversion
in one pass, engine with drafts, trainer with Adam on the host, both on the same GPU, every sync checked. Prints what
the stages and rollouts took; exits 1 where the run did not end well.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import make_tiny_checkpoint as tiny  # noqa: E402

from vime.fp8 import quantise as fp8  # noqa: E402
from vime.models.config import ModelConfig  # noqa: E402
from vime.models.families import params_of  # noqa: E402
from vime.run.journal import read_events  # noqa: E402
from vime.run.metrics import read_metrics  # noqa: E402

REWARD = """
def even(sample):
    return sum(token % 2 == 0 for token in sample.response_ids) / max(1, len(sample.response_ids))
"""
# What deepseek-r1.yaml says of one rank, with answers of 8,192 tokens.
RECIPE = """
model: deepseek-r1
device: gpu
actor-num-nodes: 1
actor-num-gpus-per-node: 1
colocate: true
hf-checkpoint: $BASE_DIR/r1
ref-load: $BASE_DIR/r1_torch_dist
conversion: one-pass
convert-num-nodes: 1
convert-ranks-per-node: 1
save-interval: 1000
save-keep: 1
recompute-granularity: full
recompute-method: uniform
recompute-num-layers: 1
use-dynamic-batch-size: true
max-tokens-per-gpu: 8704
prompt-data: $BASE_DIR/tiny-math/train.jsonl
input-key: prompt
label-key: label
apply-chat-template: true
rm-type: even_tokens:even
num-rollout: 2
rollout-batch-size: 4
n-samples-per-prompt: 4
rollout-max-response-len: 8192
rollout-temperature: 1
num-steps-per-rollout: 1
advantage-estimator: grpo
optimizer: adam
lr: 1.0e-6
weight-decay: 0.1
optimizer-cpu-offload: true
overlap-cpu-optimizer-d2h-h2d: true
use-precision-aware-optimizer: true
rollout-num-gpus-per-engine: 1
vllm-server-concurrency: 64
vllm-max-model-len: 8704
vllm-max-num-seqs: 16
vllm-speculative-config: {method: mtp, num_speculative_tokens: 1}
check-weight-sync: 1
# Random routers are close calls: engine and trainer take different experts far more often than with trained ones.
max-logprob-difference: 1.0
accumulate-allreduce-grads-in-fp32: true
attention-softmax-in-fp32: true
attention-backend: auto
attention-dropout: 0.0
hidden-dropout: 0.0
moe-token-dispatcher-type: alltoall
env:
  CUDA_DEVICE_MAX_CONNECTIONS: "1"
  VLLM_USE_DEEP_GEMM: "0"
  PYTHONPATH: {mods}
"""
RUN_SECONDS = 550.0


def config_of(layers: int, experts: int) -> dict[str, Any]:
    """R1's config.json with fewer layers and experts, the first layer dense, and the tokenizer's special ids."""
    hf = yaml.safe_load((ROOT / "configs/models/deepseek-r1.yaml").read_text())
    hf |= {"num_hidden_layers": layers, "first_k_dense_replace": 1, "n_routed_experts": experts}
    return hf | {"bos_token_id": None, "eos_token_id": tiny.END, "pad_token_id": tiny.PAD}


def make(folder: Path, layers: int, experts: int) -> None:
    """The checkpoint with its tokenizer, prompts, reward, and the recipe."""
    target = folder / "r1"
    target.mkdir(parents=True, exist_ok=True)
    (folder / "mods").mkdir(exist_ok=True)
    (folder / "mods" / "even_tokens.py").write_text(REWARD)
    (folder / "r1.yaml").write_text(RECIPE.replace("{mods}", str(folder / "mods")))
    tiny.make_data(folder, seed=0)
    hf = config_of(layers, experts)
    tiny.VOCABULARY = hf["vocab_size"]
    tiny.save_tokenizer(target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    config, tensors = ModelConfig.from_hf(hf), {}
    for param in params_of(config):
        for part in param.parts:
            value = torch.randn(part.shape, generator=generator, device=device) * 0.02
            value = torch.ones_like(value) if part.name.endswith("norm.weight") else value
            if fp8.is_quantised(part.name, part.quantised, config.quantisation):
                assert config.quantisation is not None
                codes, scales = fp8.quantise(value.to(torch.bfloat16), config.quantisation.block)
                tensors |= {part.name: codes.cpu(), fp8.scale_name(part.name): scales.cpu()}
            else:
                tensors[part.name] = value.to(torch.float32 if param.fp32 else torch.bfloat16).cpu()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": tiny.END, "pad_token_id": tiny.PAD}))
    (target / "config.json").write_text(json.dumps(hf))
    count = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("_scale_inv"))
    print(f"{count / 1e9:.2f} G parameters, {(target / 'model.safetensors').stat().st_size / 1e9:.2f} GB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--make", action="store_true", help="make model and data only")
    parser.add_argument("flags", nargs="*", help="of the recipe, after --")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if args.make:
        make(folder, args.layers, args.experts)
        return 0
    # In a process of its own: preflight refuses a GPU on which somebody holds memory.
    made = [sys.executable, __file__, "--folder", str(folder), "--layers", str(args.layers)]
    subprocess.run([*made, "--experts", str(args.experts), "--make"], check=True)
    run_dir = folder / "runs" / f"widths-{time.strftime('%H%M%S')}"
    argv = [sys.executable, "-m", "vime.submit", "--cluster", "local", "--recipe", str(folder / "r1.yaml")]
    argv += ["--nodes", "1", "--run-name", run_dir.name, "--base-dir", str(folder)]
    code = subprocess.run(
        [*argv, *(["--", *args.flags] if args.flags else [])], cwd=ROOT, timeout=RUN_SECONDS
    ).returncode
    report(run_dir)
    return int(code != 0)


def report(run_dir: Path) -> None:
    """Print the stages' seconds and each rollout's figures."""
    for event in read_events(run_dir):
        if event.kind in ("stage-end", "stage-ready", "run-end"):
            print(f"{event.stage or 'run'}: {event.text}")
    names = ("generate_time", "train_time", "sync_time", "sync/time", "abs_diff", "grad_norm", "accept", "tokens_per")
    for number, values in sorted(read_metrics(run_dir).items()):
        shown = {name: round(value, 4) for name, value in values.items() if any(part in name for part in names)}
        print(f"rollout {number}: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
