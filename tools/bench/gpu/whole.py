"""A whole run on one GPU against its parts alone: generation against bare vLLM, training against bare Megatron-core.

    python tools/bench/gpu/whole.py --folder DIR [--rollouts 4] [--layers 28] [-- recipe flags]

Makes a dense model of 1.7 B parameters (Qwen3's shape, random weights) in DIR, runs vime on it with trainer and engine
on the same GPU, and then measures the peers in processes of their own, on what the run left behind:

- generation: vLLM's offline engine with the run's engine options, on the prompts of the last rollout, each answer as
  long as it was there
- training: Megatron-core's forward-backward-step with its own cross entropy, on the same packed micro-batches and
  with the same optimizer
- weight sync: a copy of the same bytes in the GPU's memory

Prints its ratios last and exits 1 where one falls short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import make_tiny_checkpoint as tiny  # noqa: E402

from vime.megatron.packing import micro_batches  # noqa: E402
from vime.models.config import ModelConfig  # noqa: E402
from vime.models.families import params_of  # noqa: E402
from vime.models.flops import utilisation  # noqa: E402
from vime.observe.samples import read_rollout  # noqa: E402
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
WANTED = {"generation": 0.95, "training": 0.95, "sync": 0.25, "whole": 0.90}


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
    """The run's folder, once the run has ended."""
    name = f"whole-{time.strftime('%H%M%S')}"
    argv = [sys.executable, "-m", "vime.submit", "--cluster", "local", "--recipe", str(folder / "dense.yaml")]
    argv += ["--nodes", "1", "--run-name", name, "--base-dir", str(folder), "--", "--num-rollout", str(rollouts)]
    subprocess.run([*argv, *flags], check=True, cwd=ROOT, timeout=1800)
    return folder / "runs" / name


def settled(run_dir: Path, name: str) -> float:
    """Median of a metric over the rollouts after the first, which warms everything up."""
    values = [value for step, value in series(read_metrics(run_dir), name) if step > 0]
    if not values:
        raise SystemExit(f"error: the run has no {name} after its first rollout")
    return statistics.median(values)


def peer_generation(run_dir: Path) -> dict[str, float]:
    """Tokens a second of vLLM's offline engine on the last rollout's prompts and lengths, after one pass to warm up."""
    from vllm import LLM, SamplingParams

    plan = read_plan(run_dir)
    rollout = read_rollout(run_dir / "rollouts", plan.recipe.rollout.num_rollout - 1)
    options = {name: value for name, value in plan.recipe.engine.vllm.items() if value is not None}
    engine = LLM(str(plan.recipe.checkpoint.hf_checkpoint), logprobs_mode="processed_logprobs", **options)
    prompts: Any = [{"prompt_token_ids": list(sample.prompt_ids)} for sample in rollout.samples]
    lengths = [len(sample.response_ids) for sample in rollout.samples]
    asked = [
        SamplingParams(max_tokens=n, ignore_eos=True, temperature=1.0, logprobs=0, detokenize=False) for n in lengths
    ]
    speeds = []
    for _ in range(3):
        engine.reset_prefix_cache()
        started = time.perf_counter()
        answers: Any = engine.generate(prompts, asked, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert [len(answer.outputs[0].token_ids) for answer in answers] == lengths
        speeds.append(sum(lengths) / seconds)
    return {"tokens_per_s": statistics.median(speeds[1:]), "seconds": sum(lengths) / statistics.median(speeds[1:])}


def peer_training(run_dir: Path) -> dict[str, float]:
    """Tokens a second of Megatron-core's own step over the last rollout, packed as the run packed it."""
    from vime.megatron.microbatch import Padding, RolloutTokens, make_batch
    from vime.megatron.model import BuildOptions, build_model
    from vime.megatron.optimizer import Optimizer
    from vime.megatron.parallel import init_parallel

    plan = read_plan(run_dir)
    recipe, config = plan.recipe, ModelConfig.from_hf(plan.model_config_hf)
    rollout = read_rollout(run_dir / "rollouts", recipe.rollout.num_rollout - 1)
    init_parallel(plan.layout, rank=0, master_address="127.0.0.1", master_port=29611)
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks = build_model(config, plan.layout, bf16=recipe.model.bf16, options=BuildOptions.from_recipe(recipe))
    optimizer = Optimizer(chunks, recipe, total_steps=100)
    data = RolloutTokens.of([(sample.prompt_ids, sample.response_ids) for sample in rollout.samples])
    lengths = [len(sequence) for sequence in data.sequences]
    packed = micro_batches(lengths, recipe.perf.max_tokens_per_gpu or 0, 1)[0]
    device = torch.device("cuda", 0)
    batches = [make_batch(data, members, Padding(), cp_rank=0, cp_size=1, device=device) for members in packed]

    def forward(iterator: Iterator[Any], model: Any) -> Any:
        batch = next(iterator)
        bounds, longest = batch.bounds, batch.longest
        described = PackedSeqParams("thd", bounds, bounds, bounds, bounds, longest, longest)
        losses = model(batch.tokens, batch.positions, None, labels=batch.targets[None], packed_seq_params=described)
        mask = (batch.response_index >= 0).float()

        def measure(output: torch.Tensor) -> Any:
            return (
                (output.view(-1).float() * mask).sum() / data.response_tokens,
                torch.zeros((), dtype=torch.int, device=device),
                {},
            )

        return losses, measure

    def step() -> None:
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=optimizer.chunks,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.size(1),
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()

    seconds = timed(step)
    found = {"tokens_per_s": sum(lengths) / seconds, "seconds": seconds}
    mfu = utilisation(config, lengths, seconds=seconds, gpus=1, device=torch.cuda.get_device_name())
    return found | ({} if mfu is None else {"mfu": mfu})


def peer_copy(run_dir: Path) -> dict[str, float]:
    """Seconds of a copy of the sync's bytes inside the GPU's memory."""
    size = int(settled(run_dir, "sync/bytes"))
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return {"seconds": timed(lambda: target.copy_(source))}


PEERS: dict[str, Callable[[Path], dict[str, float]]] = {
    "generation": peer_generation,
    "training": peer_training,
    "copy": peer_copy,
}


def timed(call: Callable[[], object], runs: int = 3) -> float:
    """Median seconds after one call more."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def ask(peer: str, run_dir: Path) -> dict[str, float]:
    """A peer's figures, from a process of its own: the GPU is empty when it starts."""
    argv = [sys.executable, __file__, "--folder", str(run_dir), "--peer", peer]
    answer = subprocess.run(argv, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def compare(run_dir: Path) -> int:
    """Print the table; 1 where a ratio falls short."""
    generation, training, copy = (ask(peer, run_dir) for peer in PEERS)
    seconds = {name: settled(run_dir, f"perf/{name}_time") for name in ("generate", "train", "sync")}
    speed = settled(run_dir, "perf/train_tokens_per_s")
    rollout_tokens = settled(run_dir, "perf/rollout_tokens_per_s")
    own = settled(run_dir, "sync/time")
    rows = [
        ("generation", rollout_tokens / generation["tokens_per_s"], f"{rollout_tokens:,.0f} tokens/s of "
         f"{generation['tokens_per_s']:,.0f}"),
        ("training", speed / training["tokens_per_s"], f"{speed:,.0f} tokens/s of {training['tokens_per_s']:,.0f}, MFU "
         f"{settled(run_dir, 'perf/mfu'):.3f} of {training.get('mfu', float('nan')):.3f}"),
        ("sync", copy["seconds"] / own, f"{own:.3f} s, a copy {copy['seconds']:.4f} s"),
        ("whole", (generation["seconds"] + training["seconds"]) / sum(seconds.values()),
         ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
         + f"; bare {generation['seconds']:.2f} and {training['seconds']:.2f} s"),
    ]  # fmt: skip
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for name in sorted({name for row in read_metrics(run_dir).values() for name in row}):
        if name.startswith("sync/") or (name.startswith("handover/") and name.endswith("_time")):
            print(f"  {name}: {settled(run_dir, name):.4g}")
    for name, ratio, text in rows:
        print(f"{name}: {ratio:.3f} (wanted {WANTED[name]}): {text}")
    return int(any(ratio < WANTED[name] for name, ratio, _ in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for model, data and run; some 5 GB")
    parser.add_argument("--rollouts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="of the recipe, after --")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if args.peer:
        print(json.dumps(PEERS[args.peer](folder)))
        return 0
    if args.make:
        make_dense(folder, args.layers)
        return 0
    # In a process of its own: preflight refuses a GPU on which somebody holds memory.
    subprocess.run([sys.executable, __file__, "--folder", folder, "--layers", str(args.layers), "--make"], check=True)
    return compare(run(folder, args.rollouts, args.flags))


if __name__ == "__main__":
    sys.exit(main())
