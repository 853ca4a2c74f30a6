"""Block-fp8 kernels for GPUs: every tensor of a batch in one launch, bit-equal to `vime.checkpoint.fp8`.

A launch takes lists of tensors of any shapes: a table of addresses and a table that gives every block its tensor lie on
the device, so 256 experts of a layer cost one launch and no copy into a contiguous buffer.
"""

# Triton types its language as ordinary Python only in part.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8_MAX = 448.0
MIN_AMAX = 1e-10


@dataclass(frozen=True)
class BlockTable:
    """The blocks of a list of matrices: addresses, shapes and, for every block, its matrix and its place in it."""

    rows: Tensor
    """int64 [tensors, 6]: address in, address out, address of scales, M, N, first block."""
    owner: Tensor
    """int32 [blocks]: the matrix a block belongs to."""


def block_table(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], scales: Sequence[Tensor], block: int
) -> BlockTable:
    """Tables for one launch over contiguous matrices of one device; they hold addresses, so keep the tensors alive."""
    rows, counts, first = [], [], 0
    for source, target, scale in zip(inputs, outputs, scales, strict=True):
        if not (source.is_contiguous() and target.is_contiguous() and scale.is_contiguous()):
            raise ValueError("block-fp8 kernels take contiguous matrices")
        m, n = source.shape
        rows.append([source.data_ptr(), target.data_ptr(), scale.data_ptr(), m, n, first])
        counts.append(triton.cdiv(m, block) * triton.cdiv(n, block))
        first += counts[-1]
    device = inputs[0].device
    owner = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32), torch.tensor(counts))
    return BlockTable(torch.tensor(rows, dtype=torch.int64).to(device), owner.to(device))


@triton.jit
def _place(rows, owner, BLOCK: tl.constexpr, N_ALIGNED: tl.constexpr):
    """Addresses, offsets and mask of this program's block."""
    pid = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(owner + pid).to(tl.int64) * 6
    m = tl.load(row + 3)
    n = tl.load(row + 4)
    local = pid - tl.load(row + 5)
    columns = (n + BLOCK - 1) // BLOCK
    i = (local // columns) * BLOCK + tl.arange(0, BLOCK)
    j = (local % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = (i[:, None] < m) & (j[None, :] < n)
    offsets = i[:, None] * n + tl.max_contiguous(tl.multiple_of(j[None, :], N_ALIGNED), N_ALIGNED)
    return row, local, offsets, inside


@triton.jit
def _quantise_kernel(rows, owner, IN: tl.constexpr, BLOCK: tl.constexpr, FP8_MAX: tl.constexpr, MIN_AMAX: tl.constexpr):
    row, local, offsets, inside = _place(rows, owner, BLOCK, 1)
    source = tl.load(row).to(tl.pointer_type(IN))
    target = tl.load(row + 1).to(tl.pointer_type(tl.float8e4nv))
    scales = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    x = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    # The maximum passes over NaN; a block that holds one gets a NaN scale, which the caller looks for.
    bad = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    scale = tl.div_rn(tl.maximum(amax, MIN_AMAX), FP8_MAX)
    q = tl.div_rn(x, scale)
    tl.store(target + offsets, q.to(tl.float8e4nv), mask=inside)
    tl.store(scales + local, tl.where(bad > 0, float("nan"), scale))


@triton.jit
def _dequantise_kernel(rows, owner, OUT: tl.constexpr, BLOCK: tl.constexpr):
    row, local, offsets, inside = _place(rows, owner, BLOCK, 1)
    source = tl.load(row).to(tl.pointer_type(tl.float8e4nv))
    target = tl.load(row + 1).to(tl.pointer_type(OUT))
    scale = tl.load(tl.load(row + 2).to(tl.pointer_type(tl.float32)) + local)
    q = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + offsets, (q * scale).to(OUT), mask=inside)


_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}


def _grid(shape: Sequence[int], block: int) -> tuple[int, int]:
    return triton.cdiv(shape[0], block), triton.cdiv(shape[1], block)


def quantise_many(weights: Sequence[Tensor], block: int = 128) -> tuple[list[Tensor], list[Tensor]]:
    """Quantise matrices [M, N] of one type on one GPU in one launch.

    Returns e4m3 matrices of the same shapes and fp32 scales [ceil(M/block), ceil(N/block)]; a block that holds NaN or
    infinity has a scale that is not finite (`first_not_finite` finds it without reading the weights again).
    """
    device = weights[0].device
    outputs = [torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=device) for w in weights]
    scales = [torch.empty(_grid(w.shape, block), dtype=torch.float32, device=device) for w in weights]
    table = block_table(weights, outputs, scales, block)
    launch_quantise(table, weights[0].dtype, block)
    return outputs, scales


def launch_quantise(table: BlockTable, dtype: torch.dtype, block: int = 128) -> None:
    """The launch alone, for callers that keep the tables of weights that stay where they are."""
    _quantise_kernel[(table.owner.numel(),)](
        table.rows, table.owner, _TRITON_TYPES[dtype], block, FP8_MAX, MIN_AMAX, num_warps=8
    )  # fmt: skip


def dequantise_many(
    quantised: Sequence[Tensor], scales: Sequence[Tensor], block: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """`dtype(fp32(q) * scale)` of every matrix in one launch."""
    outputs = [torch.empty(q.shape, dtype=dtype, device=q.device) for q in quantised]
    launch_dequantise(block_table(quantised, outputs, scales, block), dtype, block)
    return outputs


def launch_dequantise(table: BlockTable, dtype: torch.dtype = torch.bfloat16, block: int = 128) -> None:
    """The launch alone."""
    _dequantise_kernel[(table.owner.numel(),)](table.rows, table.owner, _TRITON_TYPES[dtype], block, num_warps=8)


def first_not_finite(scales: Sequence[Tensor]) -> int | None:
    """Index of the first matrix with a scale that is not finite; one transfer for all."""
    finite = torch.stack([torch.isfinite(scale).all() for scale in scales]).cpu()
    return None if bool(finite.all()) else int((~finite).nonzero()[0])
