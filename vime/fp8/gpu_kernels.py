"""Block-fp8 kernels for GPUs: every tensor of a batch in one launch, bit-equal to `vime.fp8.quantise`.

A launch takes lists of matrices of any shapes, as a table of addresses and a map from block to matrix on the device, so
256 experts of a layer cost one launch and no copy into a contiguous buffer.
"""

# Triton's type annotations cover only part of its language.
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
    """Device tables of a list of matrices: addresses, shapes, and the matrix of every block."""

    rows: Tensor
    """int64 [tensors, 6]: address in, address out, address of scales, M, N, first block."""
    owner: Tensor
    """int32 [blocks]: index of each block's matrix."""
    wrong: Tensor
    """int32 [tensors]: 1 for a matrix with NaN or infinity, set by quantising."""
    aligned: bool
    """True if addresses and row lengths are multiples of 16, so that loads and stores can be wide."""


def block_table(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], scales: Sequence[Tensor], block: int
) -> BlockTable:
    """Build the tables for one launch over matrices on one device. They hold addresses: keep the tensors alive.

    Raises ValueError for a matrix that is not contiguous.
    """
    rows, first = [], 0
    for source, target, scale in zip(inputs, outputs, scales, strict=True):
        if not (source.is_contiguous() and target.is_contiguous() and scale.is_contiguous()):
            raise ValueError("block-fp8 kernels take contiguous matrices")
        m, n = source.shape
        rows.append([source.data_ptr(), target.data_ptr(), scale.data_ptr(), m, n, first])
        first += triton.cdiv(m, block) * triton.cdiv(n, block)
    device = inputs[0].device
    aligned = all(number % 16 == 0 for row in rows for number in (row[0], row[1], row[4]))
    table = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
    # Only the small table crosses the bus, and nothing here waits for the GPU.
    blocks = torch.arange(first, device=device)
    owner = torch.searchsorted(table[:, 5].contiguous(), blocks, right=True, out_int32=True).sub_(1)
    return BlockTable(table, owner, torch.zeros(len(rows), dtype=torch.int32, device=device), aligned)


@triton.jit
def _place(rows, owner, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """For this program: table row, block index in the matrix, element offsets, mask of elements inside the matrix."""
    pid = tl.program_id(0).to(tl.int64)
    row = rows + tl.load(owner + pid).to(tl.int64) * 6
    m = tl.load(row + 3)
    n = tl.load(row + 4)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    local = pid - tl.load(row + 5)
    columns = (n + BLOCK - 1) // BLOCK
    i = (local // columns) * BLOCK + tl.arange(0, BLOCK)
    j = (local % columns) * BLOCK + tl.arange(0, BLOCK)
    inside = (i[:, None] < m) & (j[None, :] < n)
    return row, local, i[:, None] * n + j[None, :], inside


@triton.jit
def _matrix(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Load an address from a column of the table as a pointer."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _quantise_kernel(
    rows,
    owner,
    wrong,
    IN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    FP8: tl.constexpr,
    LEAST: tl.constexpr,
):
    row, local, offsets, inside = _place(rows, owner, BLOCK, ALIGNED)
    source = _matrix(row, 0, IN, ALIGNED)
    target = _matrix(row, 1, tl.float8e4nv, ALIGNED)
    scales = _matrix(row, 2, tl.float32, False)
    x = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    # Magnitudes sort like their bits, NaN last: one reduction finds the maximum and any NaN.
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    top = tl.max(tl.max(bits, axis=1), axis=0)
    tl.store(wrong + tl.load(owner + tl.program_id(0)), 1, mask=top >= 0x7F800000)
    amax = tl.cast(top, tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(amax, LEAST), FP8)
    inverse = tl.broadcast_to(tl.div_rn(1.0, scale), x.shape)
    # Markstein's division: with a correctly rounded inverse, one corrected product is the correctly rounded quotient.
    q = x * inverse
    q = tl.fma(tl.fma(-q, tl.broadcast_to(scale, x.shape), x), inverse, q)
    # The correction would turn -0 into +0, so zeros are left unchanged.
    q = tl.where(x == 0.0, x, q)
    tl.store(target + offsets, q.to(tl.float8e4nv), mask=inside)
    tl.store(scales + local, tl.where(amax == amax, scale, amax))


@triton.jit
def _dequantise_kernel(rows, owner, OUT: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    row, local, offsets, inside = _place(rows, owner, BLOCK, ALIGNED)
    source = _matrix(row, 0, tl.float8e4nv, ALIGNED)
    target = _matrix(row, 1, OUT, ALIGNED)
    scale = tl.load(_matrix(row, 2, tl.float32, False) + local)
    q = tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + offsets, (q * scale).to(OUT), mask=inside)


_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float16: tl.float16}


def _grid(shape: Sequence[int], block: int) -> tuple[int, int]:
    return triton.cdiv(shape[0], block), triton.cdiv(shape[1], block)


def quantise_many(weights: Sequence[Tensor], block: int = 128) -> tuple[list[Tensor], list[Tensor]]:
    """Quantise matrices [M, N] of one type on one GPU in one launch.

    Returns e4m3 matrices of the same shapes and fp32 scales [ceil(M/block), ceil(N/block)]; the scale of a block with
    NaN or infinity is not finite.
    """
    device = weights[0].device
    outputs = [torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=device) for w in weights]
    scales = [torch.empty(_grid(w.shape, block), dtype=torch.float32, device=device) for w in weights]
    table = block_table(weights, outputs, scales, block)
    launch_quantise(table, weights[0].dtype, block)
    return outputs, scales


def launch_quantise(table: BlockTable, dtype: torch.dtype, block: int = 128) -> None:
    """Launch only the quantising kernel, for callers that reuse the tables of weights whose addresses do not change."""
    types = (_TRITON_TYPES[dtype], block, table.aligned)
    tensors = (table.rows, table.owner, table.wrong)
    _quantise_kernel[(table.owner.numel(),)](*tensors, *types, FP8_MAX, MIN_AMAX, num_warps=4)


def dequantise_many(
    quantised: Sequence[Tensor], scales: Sequence[Tensor], block: int = 128, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Dequantise matrices in one launch: `dtype(fp32(q) * scale)`."""
    outputs = [torch.empty(q.shape, dtype=dtype, device=q.device) for q in quantised]
    launch_dequantise(block_table(quantised, outputs, scales, block), dtype, block)
    return outputs


def launch_dequantise(table: BlockTable, dtype: torch.dtype = torch.bfloat16, block: int = 128) -> None:
    """Launch only the dequantising kernel."""
    types = (_TRITON_TYPES[dtype], block, table.aligned)
    _dequantise_kernel[(table.owner.numel(),)](table.rows, table.owner, *types, num_warps=8)
