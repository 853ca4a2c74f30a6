"""A whole run on one GPU against its parts alone: generation against bare vLLM, training against bare Megatron-core.

    python tools/bench/gpu/whole.py --folder DIR [--rollouts 3] [--layers 28] [-- recipe flags]
    python tools/bench/gpu/whole.py --folder DIR --run RUN [--only training] [--profile FILE] [-- recipe flags]

Makes a dense model of 1.7 B parameters (Qwen3's shape, random weights) in DIR and runs vime on it with trainer and
engine on the same GPU, until the last sync; its checkpoint is not waited for. Then measures the peers in processes of
their own, on what the run left behind:

- generation: vLLM's offline engine with the run's engine options, on the prompts of the last rollout, each answer as
  long as it was there
- serving: the same requests, all at once, to the run's engine command
- training: Megatron-core's forward-backward-step with its own cross entropy on the same packed micro-batches, and
  vime's step, both with the same model and optimizer in one process
- copies: the sync's bytes inside the GPU's memory, and pinned memory over PCIe, both ways

The second form goes on with a run that is there; flags after `--` change its recipe (recompute, attention). Prints each
figure when it is known, ratios last, and exits 1 where one falls short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import make_tiny_checkpoint as tiny  # noqa: E402

from vime.models.config import ModelConfig  # noqa: E402
from vime.models.families import params_of  # noqa: E402
from vime.run.folder import read_plan  # noqa: E402
from vime.run.metrics import read_metrics, series  # noqa: E402

VOCABULARY = 151936
REWARD = """
def even(sample):
    return sum(token % 2 == 0 for token in sample.response_ids) / max(1, len(sample.response_ids))
"""
RECIPE = """
model: qwen3-4b
device: gpu
actor-num-nodes: 1
actor-num-gpus-per-node: 1
colocate: true
hf-checkpoint: $BASE_DIR/dense
conversion: direct
save-interval: 1000
save-keep: 1
recompute-granularity: full
recompute-method: uniform
recompute-num-layers: 1
use-dynamic-batch-size: true
max-tokens-per-gpu: 9216
prompt-data: $BASE_DIR/tiny-math/train.jsonl
input-key: prompt
label-key: label
apply-chat-template: true
rm-type: even_tokens:even
rollout-batch-size: 16
n-samples-per-prompt: 8
rollout-max-response-len: 1024
rollout-temperature: 1
global-batch-size: 128
advantage-estimator: grpo
optimizer: adam
lr: 1.0e-6
clip-grad: 1.0
rollout-num-gpus-per-engine: 1
vllm-server-concurrency: 256
vllm-max-model-len: 2048
check-weight-sync: 4
save-debug-rollout-data: true
accumulate-allreduce-grads-in-fp32: true
attention-softmax-in-fp32: true
attention-backend: auto
attention-dropout: 0.0
hidden-dropout: 0.0
env:
  CUDA_DEVICE_MAX_CONNECTIONS: "1"
  PYTHONPATH: {mods}
"""
PEERS = ("generation", "training", "copies", "serving")
WANTED = {"generation": 0.95, "training": 0.95, "sync": 0.25, "whole": 0.90, "hand-over": 0.80}
START_SECONDS, ROLLOUT_SECONDS, PEER_SECONDS = 400.0, 120.0, 400.0


def make_dense(folder: Path, layers: int) -> None:
    """A random Qwen3 with its tokenizer, sums as prompts, a reward that any answer gets a part of, and the recipe."""
    target = folder / "dense"
    (folder / "mods").mkdir(parents=True, exist_ok=True)
    (folder / "mods" / "even_tokens.py").write_text(REWARD)
    (folder / "dense.yaml").write_text(RECIPE.replace("{mods}", str(folder / "mods")))
    tiny.make_data(folder, seed=0)
    if (target / "config.json").is_file():
        return
    target.mkdir(exist_ok=True)
    hf = {
        **tiny.CONFIGS["qwen3"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY,
        "max_position_embeddings": 40960,
    }  # fmt: skip
    tiny.VOCABULARY = VOCABULARY
    tiny.save_tokenizer(target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for param in params_of(ModelConfig.from_hf(hf)):
        for part in param.parts:
            value = torch.randn(part.shape, generator=generator, device=device) * 0.02
            value = torch.ones_like(value) if part.name.endswith("norm.weight") else value
            tensors[part.name] = value.to(torch.bfloat16).cpu()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": tiny.END, "pad_token_id": tiny.PAD}))
    (target / "config.json").write_text(json.dumps(hf))


def run(folder: Path, rollouts: int, flags: list[str]) -> Path:
    """The run's folder, once this many rollouts are synced. Raises SystemExit where the run ends before."""
    name = f"whole-{time.strftime('%H%M%S')}"
    argv = [sys.executable, "-m", "vime.submit", "--cluster", "local", "--recipe", str(folder / "dense.yaml")]
    # One rollout more, which is never trained: the last one's checkpoint would take longer than the run.
    argv += ["--nodes", "1", "--run-name", name, "--base-dir", str(folder), "--", "--num-rollout", str(rollouts + 1)]
    run_dir = folder / "runs" / name
    started = subprocess.Popen([*argv, *flags], cwd=ROOT)
    end = time.monotonic() + START_SECONDS + rollouts * ROLLOUT_SECONDS
    while "perf/sync_time" not in read_metrics(run_dir).get(rollouts - 1, {}):
        if started.poll() is not None:
            raise SystemExit(f"error: the run ended with {started.returncode} before rollout {rollouts - 1} was synced")
        if time.monotonic() > end:
            raise SystemExit(f"error: rollout {rollouts - 1} was not synced in time")
        time.sleep(0.5)
    subprocess.run([sys.executable, "-m", "vime.cancel", str(run_dir)], cwd=ROOT, check=True, timeout=120)
    started.wait(60)
    return run_dir


def settled(run_dir: Path, name: str) -> float:
    """Median of a metric over the rollouts after the first, which warms everything up; nan where there is none."""
    values = [value for step, value in series(read_metrics(run_dir), name) if step > 0]
    return statistics.median(values) if values else float("nan")


def ask(peer: str, folder: Path, run_dir: Path, flags: list[str], profile: Path | None) -> dict[str, Any]:
    """A peer's figures, from a process of its own: the GPU is empty when it starts."""
    peers = Path(__file__).with_name("whole_peers.py")
    answer = run_dir / f"peer-{peer}.json"
    argv = [sys.executable, str(peers), peer, "--folder", str(folder), "--run", str(run_dir), "--answer", str(answer)]
    argv += ["--profile", str(profile)] if profile else []
    log = run_dir / f"peer-{peer}.log"
    with log.open("w") as output:
        done = subprocess.run([*argv, "--", *flags], stdout=output, stderr=subprocess.STDOUT, timeout=PEER_SECONDS)
    if done.returncode:
        print("\n".join(log.read_text().splitlines()[-15:]))
        raise SystemExit(f"error: peer {peer} ended with {done.returncode}, see {log}")
    found = json.loads(answer.read_text())
    print(f"{peer}: {json.dumps(found)}", flush=True)
    return found


def describe(run_dir: Path) -> None:
    """Print the run's own figures."""
    metrics = read_metrics(run_dir)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {run_dir.name}")
    for name, value in sorted(metrics.get(0, {}).items()):
        if name.startswith("start/") and name.endswith("_time"):
            print(f"  {name}: {value:.4g}")
    for name in sorted({name for row in metrics.values() for name in row}):
        handover = name.startswith("handover/") and name.endswith(("_time", "taken_bytes"))
        if handover or name.startswith(("sync/", "perf/")):
            print(f"  {name}: " + ", ".join(f"{value:.4g}" for _, value in series(metrics, name)))
    sys.stdout.flush()


def ratios(run_dir: Path, found: dict[str, dict[str, Any]]) -> list[tuple[str, float, str]]:
    """(name, ratio, text) of everything that its peer was measured for."""
    rows: list[tuple[str, float, str]] = []
    generation, training, copies = (found.get(name) for name in PEERS[:3])
    if generation:
        speed, bare = settled(run_dir, "perf/rollout_tokens_per_s"), generation["tokens_per_s"]
        rows.append(("generation", speed / bare, f"{speed:,.0f} tokens/s of {bare:,.0f}"))
    if training:
        own, bare = training["vime"], training["bare"]
        text = f"{own['seconds']:.2f} s a step, bare {bare['seconds']:.2f} s; MFU {own['mfu']:.3f} of {bare['mfu']:.3f}"
        rows.append(("training", bare["seconds"] / own["seconds"], text))
    if copies:
        sync = settled(run_dir, "sync/time")
        rows.append(("sync", copies["device_seconds"] / sync, f"{sync:.3f} s, a copy {copies['device_seconds']:.4f} s"))
        planned = {item.name: item.bytes for item in read_plan(run_dir).nodes[0].host_memory.items}
        for part, item in (("gradients", "optimizer_backup"), ("weights", "weights_backup")):
            for step, rate in (("leave", copies["to_host"]), ("come_back", copies["to_device"])):
                speed = planned.get(item, 0) / settled(run_dir, f"handover/{part}_{step}_time")
                rows.append(("hand-over", speed / rate, f"{part} {step} at {speed / 1e9:.1f} of {rate / 1e9:.1f} GB/s"))
    if generation and training:
        seconds = {name: settled(run_dir, f"perf/{name}_time") for name in ("generate", "train", "sync")}
        bare = generation["seconds"] + training["bare"]["seconds"]
        text = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()) + f"; bare {bare:.2f} s"
        rows.append(("whole", bare / sum(seconds.values()), text))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for model, data and run; some 5 GB")
    parser.add_argument("--rollouts", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--run", type=Path, help="a run that is there: only its peers are measured")
    parser.add_argument("--only", choices=PEERS, nargs="*", default=PEERS, help="the peers to measure")
    parser.add_argument("--profile", type=Path, help="file for the profile of both training steps")
    parser.add_argument("--make", action="store_true", help="make model and data only")
    parser.add_argument("flags", nargs="*", help="of the recipe, after --")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if args.make:
        make_dense(folder, args.layers)
        return 0
    run_dir = args.run and args.run.absolute()
    if run_dir is None:
        # In a process of its own: preflight refuses a GPU on which somebody holds memory.
        made = [sys.executable, __file__, "--folder", str(folder), "--layers", str(args.layers), "--make"]
        subprocess.run(made, check=True)
        run_dir = run(folder, args.rollouts, args.flags)
    describe(run_dir)
    found = {peer: ask(peer, folder, run_dir, args.flags, args.profile) for peer in args.only}
    rows = ratios(run_dir, found)
    for name, ratio, text in rows:
        print(f"{name}: {ratio:.3f} (wanted {WANTED[name]}): {text}")
    return int(any(not ratio >= WANTED[name] for name, ratio, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
