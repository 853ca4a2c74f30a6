"""Log-probs and entropy on one GPU: the kernels against torch's operations in chunks and against cross-entropies.

    python tools/bench/gpu/log_probs.py [--tokens 9216] [--vocabulary 151936]

Each is timed forward and backward on the same bf16 logits; torch's and Megatron's cross-entropy give no entropy. Exits
1 where the kernels, with entropy, are slower than torch's cross-entropy or hold more memory than one gradient.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vime.megatron.logprobs import token_log_probs

GB = 1e9
Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets to a scalar."""


def ours(*, fused: bool, with_entropy: bool) -> Loss:
    """Sum of log-probs and, with it, of the entropy, by the kernels or by torch's operations."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        log_probs, entropy = token_log_probs(logits, targets, with_entropy=with_entropy, fused=fused)
        return -log_probs.sum() if entropy is None else -log_probs.sum() - 0.01 * entropy.sum()

    return loss


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def megatron_cross_entropy() -> Loss | None:
    """Megatron-core's fused cross-entropy on a group of this process alone; None without Megatron-core."""
    try:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    except ImportError:
        return None
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        found = fused_vocab_parallel_cross_entropy(logits.unsqueeze(1), targets.unsqueeze(1), dist.group.WORLD)
        return found.sum()

    return loss


def measure(loss: Loss, logits: Tensor, targets: Tensor, runs: int) -> tuple[float, int]:
    """Median seconds of forward and backward by CUDA events, after warm-up, and peak bytes beyond the logits."""

    def step() -> None:
        logits.grad = None
        loss(logits, targets).backward()

    for _ in range(3):
        step()
    logits.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    peak = torch.cuda.max_memory_allocated() - before
    logits.grad = None
    return statistics.median(times), peak


def check_equality(logits: Tensor, targets: Tensor) -> None:
    """The first tokens' results and gradients are those of torch's operations, to bf16's rounding."""
    found = []
    for fused in (True, False):
        some = logits[:256].detach().clone().requires_grad_()
        results = token_log_probs(some, targets[:256], temperature=0.7, with_entropy=True, fused=fused)
        assert results[1] is not None
        (results[0] - 0.01 * results[1]).sum().backward()
        found.append((*results, some.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=1e-4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=9216)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    logits = torch.randn(args.tokens, args.vocabulary, device="cuda", dtype=torch.bfloat16).mul_(3).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,), device="cuda")
    check_equality(logits, targets)
    gradient = logits.numel() * logits.element_size()
    print(f"{args.tokens} tokens, {args.vocabulary} words: logits and gradient {gradient / GB:.2f} GB each")
    losses: dict[str, Loss] = {
        "kernels with entropy": ours(fused=True, with_entropy=True),
        "kernels": ours(fused=True, with_entropy=False),
        "chunks with entropy": ours(fused=False, with_entropy=True),
        "chunks": ours(fused=False, with_entropy=False),
        "cross_entropy": cross_entropy,
    }
    megatron = megatron_cross_entropy()
    if megatron is not None:
        losses["Megatron's, fused"] = megatron
    measured = {name: measure(loss, logits, targets, args.runs) for name, loss in losses.items()}
    print("TB/s: logits read twice and a gradient written; GB: peak beside the logits")
    for name, (seconds, peak) in measured.items():
        print(f"{name:>20}: {seconds * 1e3:8.3f} ms {3 * gradient / seconds / 1e12:5.2f} TB/s {peak / GB:6.2f} GB")
    mine, peak = measured["kernels with entropy"]
    ratios = {name: seconds / mine for name, (seconds, _) in measured.items() if not name.startswith("kernels")}
    print("kernels with entropy, times as fast: " + ", ".join(f"{ratio:.2f} {name}" for name, ratio in ratios.items()))
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0 if ratios["cross_entropy"] >= 1 and peak < 1.05 * gradient else 1


if __name__ == "__main__":
    sys.exit(main())
