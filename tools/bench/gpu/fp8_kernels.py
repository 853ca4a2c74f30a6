"""Block-fp8 kernels on one GPU: bit-equality with the CPU path, and speed against a copy of the same bytes.

    python tools/bench/gpu/fp8_kernels.py [--experts 256]

Prints its ratios last and exits 1 where one falls short of 0.85.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch

from vime.fp8.gpu_kernels import block_table, dequantise_many, launch_dequantise, launch_quantise, quantise_many
from vime.fp8.quantise import dequantise, quantise

FLOOR = 0.85
SHAPES = ((2 * 2048, 7168), (7168, 2048))
ODD_SHAPES = ((128, 128), (1, 1), (130, 300), (576, 7168), (257, 129), (64, 1000))


def seconds(call: Callable[[], object], runs: int = 10) -> float:
    """Median seconds of a call by CUDA events, after warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_seconds(total_bytes: int) -> float:
    """A device-to-device copy that reads and writes `total_bytes` in all."""
    source = torch.empty(total_bytes // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source))


def check_equality() -> int:
    """Matrices of odd shapes and of extreme values; returns how many were compared."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in ODD_SHAPES]
    weights += [torch.zeros(200, 200, dtype=torch.bfloat16), weights[2] * 1e30, weights[2] * 1e-30]
    weights += [(torch.randn(SHAPES[0], generator=generator) * 0.02).to(torch.bfloat16)]
    q_gpu, s_gpu = quantise_many([w.cuda() for w in weights])
    back = dequantise_many(q_gpu, s_gpu)
    for weight, q, s, b in zip(weights, q_gpu, s_gpu, back, strict=True):
        q_cpu, s_cpu = quantise(weight)
        name = tuple(weight.shape)
        assert torch.equal(s.cpu(), s_cpu), f"scales differ for {name}"
        assert torch.equal(q.cpu().view(torch.uint8), q_cpu.view(torch.uint8)), f"fp8 differs for {name}"
        assert torch.equal(b.cpu(), dequantise(q_cpu, s_cpu)), f"bf16 differs for {name}"
    return len(weights)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"bit-equal to the CPU path: {check_equality()} matrices")
    weights = [torch.randn(shape, device="cuda").to(torch.bfloat16) for _ in range(args.experts) for shape in SHAPES]
    quantised, scales = quantise_many(weights)
    parameters = sum(w.numel() for w in weights)
    moved = 3 * parameters + 4 * sum(s.numel() for s in scales)
    forward, backward = block_table(weights, quantised, scales, 128), block_table(quantised, weights, scales, 128)
    quantise_s = seconds(partial(launch_quantise, forward, torch.bfloat16))
    dequantise_s = seconds(partial(launch_dequantise, backward))
    del weights, quantised
    torch.cuda.empty_cache()
    copy_s = copy_seconds(moved)
    print(f"{args.experts} experts, {parameters / 1e9:.2f} G parameters, {moved / 1e9:.1f} GB read and written")
    for name, s in (("copy", copy_s), ("quantise", quantise_s), ("dequantise", dequantise_s)):
        print(f"{name:>10}: {s * 1e3:8.3f} ms {moved / s / 1e12:6.2f} TB/s")
    ratios = {"quantise": copy_s / quantise_s, "dequantise": copy_s / dequantise_s}
    print(", ".join(f"{name} {ratio:.3f} of the copy" for name, ratio in ratios.items()) + f" (floor {FLOOR})")
    return 0 if min(ratios.values()) >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
