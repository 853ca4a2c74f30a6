"""Effect of routing replay on the agreement of engine and trainer: log-probs with the engine's routes and without.

    python tools/bench/gpu/routing_replay.py --folder DIR [--layers 8] [--experts 64] [-- recipe flags]

Makes a DeepSeek-V3-shaped model in block fp8 (random weights, its own head sizes, groups and shared expert) in DIR, has
vime's engine answer prompts with it and return its routes, and computes the answers' log-probs with the trainer on the
same weights in bf16, in one process: once with the trainer's own routes, once with the engine's. Prints the mean
|log-prob difference| of both to the engine's, their ratio (wanted: at least 3), and the share of tokens that the
trainer sends to other experts, by layer. Exits 1 where the ratio falls short.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import make_tiny_checkpoint as tiny  # noqa: E402

from vime.fp8 import quantise as fp8  # noqa: E402
from vime.models.config import ModelConfig  # noqa: E402
from vime.models.families import params_of  # noqa: E402
from vime.models.namemap import Where  # noqa: E402
from vime.observe.samples import read_rollout  # noqa: E402
from vime.run.folder import read_plan  # noqa: E402

WANTED = 3.0
RECIPE = """
model: tiny-deepseek-r1
device: gpu
actor-num-gpus-per-node: 1
colocate: true
hf-checkpoint: $BASE_DIR/moe
conversion: direct
bf16: true
use-dynamic-batch-size: true
max-tokens-per-gpu: 8192
prompt-data: $BASE_DIR/tiny-math/train.jsonl
input-key: prompt
label-key: label
apply-chat-template: true
rm-type: math
num-rollout: 1
rollout-batch-size: 32
n-samples-per-prompt: 4
rollout-max-response-len: 128
rollout-temperature: 1
num-steps-per-rollout: 1
rollout-num-gpus-per-engine: 1
vllm-max-model-len: 512
vllm-enforce-eager: true
vllm-gpu-memory-utilization: 0.5
use-rollout-routing-replay: true
debug-rollout-only: true
env:
  VLLM_USE_DEEP_GEMM: "0"
"""


def make_model(folder: Path, layers: int, experts: int) -> None:
    """The checkpoint with its tokenizer, prompts, and the recipe."""
    target = folder / "moe"
    target.mkdir(parents=True, exist_ok=True)
    (folder / "moe.yaml").write_text(RECIPE)
    tiny.make_data(folder, seed=0)
    tiny.save_tokenizer(target)
    hf = {
        **tiny.CONFIGS["deepseek-v3"], **tiny.GPU_SHAPE["deepseek-v3"], "num_hidden_layers": layers,
        "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 256, "n_routed_experts": experts,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_nextn_predict_layers": 0,
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    config, tensors = ModelConfig.from_hf(hf), {}
    for param in params_of(config):
        for part in param.parts:
            if param.where == Where.MTP:
                continue
            value = torch.randn(part.shape, generator=generator, device=device) * 0.04
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


def generate(folder: Path, flags: list[str]) -> Path:
    """The folder of a run of the engine alone, which leaves a rollout and its routes."""
    run_dir = folder / "runs" / f"routes-{time.strftime('%H%M%S')}"
    shutil.rmtree(run_dir, ignore_errors=True)
    argv = [sys.executable, "-m", "vime.submit", "--cluster", "local", "--recipe", str(folder / "moe.yaml")]
    argv += ["--nodes", "1", "--run-name", run_dir.name, "--base-dir", str(folder), *(["--", *flags] if flags else [])]
    subprocess.run(argv, check=True, cwd=ROOT, timeout=400)
    return run_dir


def compare(run_dir: Path) -> int:
    """Print the differences; 1 where replay helps too little."""
    from vime.megatron.microbatch import RolloutTokens
    from vime.megatron.worker import TrainWorker

    plan, rollout = read_plan(run_dir), read_rollout(run_dir / "rollouts", 0)
    worker = TrainWorker(plan.model_copy(update={"engines": ()}), 0)
    worker.setup("127.0.0.1", 29612)
    pairs = [(sample.prompt_ids, sample.response_ids) for sample in rollout.samples]
    engine = [value for sample in rollout.samples for value in sample.log_probs]

    def difference(mine: list[float]) -> float:
        return statistics.fmean(abs(a - b) for a, b in zip(mine, engine, strict=True))

    own = difference([value for values in worker.log_probs(pairs) for value in values])
    data = RolloutTokens.of(pairs)
    worker._take_routes(rollout.rollout_id, data)
    replayed = difference(worker._replayed_log_probs(data, count=True).tolist())
    found = worker._differing()
    print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, {len(engine):,} tokens, mean "
          f"|log-prob| of the engine {statistics.fmean(map(abs, engine)):.3f} nat")  # fmt: skip
    print("other experts than the engine's: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    print(f"own routes: {own:.5f} nat, the engine's routes: {replayed:.5f} nat")
    print(f"ratio: {own / replayed:.2f} (wanted {WANTED})")
    return int(own < WANTED * replayed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--make", action="store_true", help="make model and data only")
    parser.add_argument("--run", type=Path, help="a run that is there")
    parser.add_argument("flags", nargs="*", help="of the recipe, after --")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if args.make:
        make_model(folder, args.layers, args.experts)
        return 0
    if args.run is None:
        # In a process of its own: preflight refuses a GPU on which somebody holds memory.
        made = [sys.executable, __file__, "--folder", str(folder), "--layers", str(args.layers)]
        subprocess.run([*made, "--experts", str(args.experts), "--make"], check=True)
    return compare(args.run or generate(folder, args.flags))


if __name__ == "__main__":
    sys.exit(main())
