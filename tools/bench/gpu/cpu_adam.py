"""CPU Adam on one GPU: HybridDeviceOptimizer's host memory against the plan, its step against DRAM and PCIe.

    python tools/bench/gpu/cpu_adam.py [--layers 32]

Builds a dense model in bf16 with the recipe's optimizer flags, steps it with random gradients and compares: growth of
used host memory with the plan's items for CPU Adam (within 5 %), the step with the least time that DRAM and PCIe need
for its bytes (both measured in the same run, reported), and the step with the threads that vime sets with the one
thread that Ray gives an actor (at least 4 x). Prints its ratios last and exits 1 where one falls short.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

from vime.megatron import backend, model, parallel
from vime.megatron.optimizer import Optimizer
from vime.models.config import ModelConfig
from vime.planning.memory import Weights, node_memory
from vime.recipe.load import load_recipe
from vime.recipe.parallel import ParallelLayout
from vime.run.plan import Item, TrainerRank

FLAGS = ("--optimizer-cpu-offload", "--overlap-cpu-optimizer-d2h-h2d", "--use-precision-aware-optimizer")
ITEMS = ("cpu_adam", "pinned_rounding")
MEMORY_TOLERANCE, THREADS_FLOOR = 0.05, 4.0
BYTES_A_PARAMETER = {"DRAM": 28, "DRAM, one thread": 28, "device to host": 4, "host to device": 2}
"""Adam reads weight, gradient and two moments and writes three of them; the gradient comes in fp32, the weight goes
back in bf16."""


def model_of(layers: int) -> ModelConfig:
    """Qwen3-4B's layers."""
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560,
            "intermediate_size": 9728, "num_hidden_layers": layers, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        }
    )  # fmt: skip


def used_bytes() -> int:
    """Host memory in use on this machine: pinned memory shows here, and not always in a process's own account."""
    gc.collect()
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    return fields["MemTotal"] - fields["MemAvailable"]


def median_seconds(call: Callable[[], object], runs: int = 3) -> float:
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def limits(threads: int) -> dict[str, float]:
    """Bytes a second: a copy in DRAM (read and written) by all threads, pinned copies over PCIe."""
    torch.set_num_threads(threads)
    source, target = torch.ones(2**30, dtype=torch.float32), torch.empty(2**30, dtype=torch.float32)
    rates = {"DRAM": 2 * source.nbytes / median_seconds(lambda: target.copy_(source))}
    torch.set_num_threads(1)
    rates["DRAM, one thread"] = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    host = torch.empty(2**30, dtype=torch.uint8).pin_memory()
    device = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    rates["device to host"] = 2**30 / median_seconds(lambda: host.copy_(device, non_blocking=True))
    rates["host to device"] = 2**30 / median_seconds(lambda: device.copy_(host, non_blocking=True))
    return rates


def planned(config: ModelConfig) -> list[Item]:
    """Bytes that the plan counts for CPU Adam on a node with this one rank."""
    recipe = load_recipe("qwen3-4b", FLAGS)
    layout = ParallelLayout()
    place = TrainerRank(rank=0, node=0, gpu=0, tp=0, cp=0, dp=0, pp=0, ep=0, etp=0, edp=0)
    account = node_memory(recipe, config, Weights.of(recipe, config, layout), [place], [], 0)
    return [item for item in account.items if item.name in ITEMS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="what vime sets for one rank")
    args = parser.parse_args()
    rates = limits(args.threads)
    config, layout = model_of(args.layers), ParallelLayout()
    backend.setup()
    parallel.init_parallel(layout, rank=0, master_address="127.0.0.1", master_port=29500)
    chunks = model.build_model(config, layout, bf16=True)
    parameters = sum(p.numel() for p in chunks[0].parameters())
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {parameters / 1e9:.2f} G parameters")
    torch.ones(1).pin_memory()
    before = used_bytes()
    optimizer = Optimizer(chunks, load_recipe("qwen3-4b", FLAGS), total_steps=100)
    gradients = [p.main_grad for chunk in optimizer.chunks for p in chunk.module.parameters() if p.requires_grad]

    def step() -> None:
        for gradient in gradients:
            gradient.normal_(std=1e-3)
        done = optimizer.step()
        assert not done.skipped

    step()
    step()
    torch.cuda.synchronize()
    growth = used_bytes() - before
    host = getattr(torch.cuda, "host_memory_stats", dict)()
    torch.set_num_threads(args.threads)
    ours = median_seconds(step)
    torch.set_num_threads(1)
    rays = median_seconds(step, runs=1)
    optimizer.check_master_weights()

    items = planned(config)
    expected = sum(item.bytes for item in items)
    for item in items:
        print(f"planned {item.name}: {item.bytes / 1e9:.2f} GB ({item.bytes / parameters:.2f} bytes a parameter)")
    print(f"measured growth: {growth / 1e9:.2f} GB ({growth / parameters:.2f} bytes a parameter)")
    for name in ("allocated_bytes.current", "active_bytes.current", "allocated_bytes.peak"):
        print(f"pinned {name}: {host.get(name, 0) / 1e9:.2f} GB")
    for name, rate in rates.items():
        least = BYTES_A_PARAMETER[name] * parameters / rate
        print(f"{name}: {rate / 1e9:.1f} GB/s, so at least {least:.2f} s a step; the step is {ours / least:.2f} x")
    print(f"step: {ours:.2f} s with {args.threads} threads, {rays:.2f} s with one")
    print(f"DRAM gives all threads {rates['DRAM'] / rates['DRAM, one thread']:.2f} x what it gives one")
    off = growth / expected - 1
    print(f"memory {off:+.1%} of the plan (at most 5 %), threads {rays / ours:.2f} x (floor {THREADS_FLOOR})")
    return 0 if abs(off) <= MEMORY_TOLERANCE and rays / ours >= THREADS_FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
