"""Kernels of `vime.megatron.logprobs` for GPUs: logits are read once forward, and read and written once backward."""

# Triton's type annotations cover only part of its language.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vime.megatron.logprobs import LOWEST

BLOCK = 4096
"""Columns that a program holds at a time."""
WARPS = 8
STAGES = 3
"""Blocks of a row in flight while sums are formed: each block ends in reductions, which wait for all warps."""


# Tokens differ from micro-batch to micro-batch: no variant of the kernel for each kind of number.
@triton.jit(do_not_specialize=["tokens"])
def _row_sums_kernel(
    logits,
    local,
    found,
    stride,
    tokens,
    width,
    scale,
    LOWEST: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    # Tokens times vocabulary passes 2^31.
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride
    highest = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    for start in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = tl.load(source + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(highest, tl.max(z, axis=0))
        rescale = tl.exp(highest - higher)
        exponentials = tl.exp(z - higher)
        total = total * rescale + tl.sum(exponentials, axis=0)
        if WITH_ENTROPY:
            # Past the row's end the product would be 0 * -inf.
            weighted = weighted * rescale + tl.sum(exponentials * tl.where(inside, z, 0.0), axis=0)
        highest = higher
    target = tl.load(local + row)
    here = (target >= 0) & (target < width)
    picked = tl.load(source + target, mask=here, other=0.0).to(tl.float32) * scale
    tl.store(found + row, highest)
    tl.store(found + tokens + row, picked)
    tl.store(found + 2 * tokens + row, total)
    if WITH_ENTROPY:
        tl.store(found + 3 * tokens + row, weighted)


@triton.jit
def _gradient_kernel(
    logits,
    local,
    log_sum,
    mean,
    grad_log_probs,
    grad_entropy,
    gradient,
    stride,
    width,
    scale,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * stride
    out = gradient + row * width
    target = tl.load(local + row).to(tl.int32)
    shift = tl.load(log_sum + row)
    g = tl.load(grad_log_probs + row)
    if WITH_ENTROPY:
        g_entropy = tl.load(grad_entropy + row)
        middle = tl.load(mean + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32) * scale
        weight = tl.zeros((BLOCK,), tl.float32) - g
        if WITH_ENTROPY:
            weight = weight - g_entropy * (z - middle)
        values = tl.exp(z - shift) * weight + tl.where(columns == target, g, 0.0)
        tl.store(out + columns, (values * scale).to(gradient.dtype.element_ty), mask=inside)


def row_sums(logits: Tensor, local: Tensor, scale: float, with_entropy: bool) -> Tensor:
    """`vime.megatron.logprobs.Backend.row_sums` in one pass, by the online softmax (arXiv 1805.02867).

    `logits` is bf16, fp16 or fp32 with rows at any distance. Raises ValueError unless its columns are adjacent.
    """
    _check(logits)
    tokens, width = logits.shape
    found = torch.empty(3 + with_entropy, tokens, dtype=torch.float32, device=logits.device)
    _row_sums_kernel[(tokens,)](
        logits, local.contiguous(), found, logits.stride(0), tokens, width, scale, LOWEST, with_entropy, BLOCK,
        STAGES, num_warps=WARPS,
    )  # fmt: skip
    return found


def gradient(
    logits: Tensor,
    local: Tensor,
    scale: float,
    log_sum: Tensor,
    mean: Tensor | None,
    grad_log_probs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """`vime.megatron.logprobs.Backend.gradient` in one pass, into a new contiguous tensor.

    Raises ValueError unless the logits' columns are adjacent.
    """
    _check(logits)
    tokens, width = logits.shape
    # Not over the logits: others may hold them, and a retained graph is run again.
    found = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    with_entropy = mean is not None and grad_entropy is not None
    # The gradient of a sum is one number, expanded.
    gradients = grad_log_probs.contiguous(), grad_entropy.contiguous() if grad_entropy is not None else None
    _gradient_kernel[(tokens,)](
        logits, local.contiguous(), log_sum, mean, *gradients, found, logits.stride(0), width, scale, with_entropy,
        BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return found


def _check(logits: Tensor) -> None:
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("log-probs kernels take logits whose columns are adjacent")
