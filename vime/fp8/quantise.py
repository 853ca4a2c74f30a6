"""Quantise to block fp8 (e4m3, one scale per block) and back, on CPU or GPU.

The format is DeepSeek-V3's: `scale = max(amax, 1e-10) / 448` per block, `q = e4m3(x / scale)`, stored as `<name>`
(float8_e4m3fn [M, N]) and `<name>_scale_inv` (fp32 [ceil(M/bm), ceil(N/bn)]). Blocks at the edges are smaller,
nothing is padded. With `ue8m0` the scale is rounded up to a power of two.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vime.errors import VimeError
from vime.fp8.format import SCALE_SUFFIX, Block, is_quantised, scale_name, scale_shape

__all__ = [
    "SCALE_SUFFIX",
    "Block",
    "WeightNotFinite",
    "dequantise",
    "is_quantised",
    "quantise",
    "scale_name",
    "scale_shape",
]

FP8_MAX = 448.0
MIN_AMAX = 1e-10
# The CPU kernel multiplies scales by 2^8, so larger ones would overflow; no real checkpoint comes near.
_MAX_SCALE = 2.0**119
# Least number of elements per thread.
_THREAD_ELEMENTS = 1 << 20
_NAN_CODE = 0x7F


class WeightNotFinite(VimeError):
    """A weight that must be quantised holds NaN or infinity."""


def quantise(
    weight: Tensor,
    block: Block = (128, 128),
    *,
    scale_format: str = "float32",
    name: str = "weight",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise a matrix [M, N] (bf16, fp16 or fp32) to e4m3 of the same shape and fp32 scales.

    Bit-equal to dividing every block in fp32 by its scale and rounding to nearest even. `out` receives the e4m3
    matrix. Raises WeightNotFinite, with `name` in the text, for NaN or infinity.
    """
    _check_matrix(weight, block)
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device) if out is None else out
    if weight.is_cuda:
        return q, _quantise_plain(weight, q, block, scale_format, name)
    kernels = _kernels()
    source = _unit_rows(weight if weight.dtype in (torch.bfloat16, torch.float32) else weight.to(torch.float32))
    target = _unit_rows(q)
    scale = torch.empty(scale_shape(weight.shape, block), dtype=torch.float32)
    bits = torch.int16 if source.dtype == torch.bfloat16 else torch.int32

    def part(first: int, last: int) -> None:
        blocks = slice(first // block[0], -(-last // block[0]))
        down, across = kernels.quantise(
            _flat(source[first:last], bits), source.stride(0), _flat(target[first:last], torch.uint8),
            target.stride(0), scale[blocks].numpy(), last - first, weight.shape[1], *block, scale_format == "ue8m0",
        )  # fmt: skip
        if down >= 0:
            at = (first // block[0] + down, across)
            raise WeightNotFinite(
                f"{name} holds NaN or infinity in its block {at} of {scale.shape[0]} x {scale.shape[1]}"
            )

    _over_rows(part, weight.shape, block[0])
    if target is not q:
        q.copy_(target)
    return q, scale


def _quantise_plain(weight: Tensor, q: Tensor, block: Block, scale_format: str, name: str) -> Tensor:
    """Quantise by the plain formula, one row of blocks at a time, on any device; fills `q` and returns the scales."""
    rows, columns = scale_shape(weight.shape, block)
    scale = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    # A tensor: on a GPU torch divides by a Python number as a product with its inverse, which rounds twice.
    largest = torch.full((columns,), FP8_MAX, dtype=torch.float32, device=weight.device)
    for row in range(rows):
        part = slice(row * block[0], (row + 1) * block[0])
        values = weight[part].to(torch.float32)
        across = torch.nn.functional.pad(values.abs().amax(dim=0), (0, columns * block[1] - weight.shape[1]))
        amax = across.view(columns, block[1]).amax(dim=1)
        scale[row] = amax.clamp(min=MIN_AMAX) / largest
        if scale_format == "ue8m0":
            mantissa, exponent = torch.frexp(scale[row])
            scale[row] = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
        q[part] = (values / scale[row].repeat_interleave(block[1])[: weight.shape[1]]).to(torch.float8_e4m3fn)
    if not bool(torch.isfinite(scale).all()):
        at = tuple((~torch.isfinite(scale)).nonzero()[0].tolist())
        raise WeightNotFinite(f"{name} holds NaN or infinity in its block {at} of {rows} x {columns}")
    return scale


def dequantise(
    q: Tensor,
    scale: Tensor,
    block: Block = (128, 128),
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Dequantise an e4m3 matrix [M, N] with scales [ceil(M/bm), ceil(N/bn)]: bit-equal to `dtype(fp32(q) * scale)`.

    Scales may be fp32, bf16 or float8_e8m0fnu. `out` ([M, N] of `dtype`) saves the allocation. Raises ValueError for
    scales of another shape.
    """
    _check_matrix(q, block)
    if tuple(scale.shape) != scale_shape(q.shape, block):
        raise ValueError(
            f"scales {list(scale.shape)} do not fit a matrix {list(q.shape)} in blocks of {block[0]} x {block[1]}: "
            f"expected {list(scale_shape(q.shape, block))}"
        )
    scale = scale.to(torch.float32).contiguous()
    out = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    if q.is_cuda or not bool((scale.abs() <= _MAX_SCALE).all()):
        return out.copy_(q.to(torch.float32) * _expand(scale, q.shape, block))
    kernels = _kernels()
    source = _unit_rows(q)
    direct = out.dtype in (torch.bfloat16, torch.float32) and _unit_rows(out) is out
    target = out if direct else torch.empty(q.shape, dtype=torch.float32)
    kernel, bits = (
        (kernels.dequantise_bf16, torch.int16) if target.dtype == torch.bfloat16
        else (kernels.dequantise_fp32, torch.float32)
    )  # fmt: skip

    def part(first: int, last: int) -> None:
        blocks = slice(first // block[0], -(-last // block[0]))
        largest = kernel(
            _flat(source[first:last], torch.int8), source.stride(0), scale[blocks].numpy(),
            _flat(target[first:last], bits), target.stride(0), last - first, q.shape[1], *block,
        )  # fmt: skip
        if largest == _NAN_CODE:
            is_nan = source[first:last].view(torch.uint8).bitwise_and(_NAN_CODE) == _NAN_CODE
            target[first:last].masked_fill_(is_nan, float("nan"))

    _over_rows(part, q.shape, block[0])
    return out if direct else out.copy_(target)


def _kernels() -> Any:
    """Import the compiled kernels only when needed, because numba is slow to import."""
    from vime.fp8 import cpu_kernels as fp8_cpu

    return fp8_cpu


def _unit_rows(matrix: Tensor) -> Tensor:
    """The matrix itself if its rows are contiguous, otherwise a contiguous copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] <= 1 else matrix.contiguous()


def _flat(matrix: Tensor, bits: torch.dtype) -> np.ndarray:
    """Flat memory from a matrix's first element to its last, viewed as a type of the same size."""
    if matrix.numel() == 0:
        return torch.empty(0, dtype=bits).numpy()
    span = (matrix.shape[0] - 1) * matrix.stride(0) + matrix.shape[1]
    return matrix.detach().view(bits).as_strided((span,), (1,)).numpy()


def _over_rows(part: Callable[[int, int], None], shape: Sequence[int], block_rows: int) -> None:
    """Call `part(first, last)` for ranges of whole block rows, on up to torch's number of threads, by matrix size."""
    blocks = math.ceil(shape[0] / block_rows)
    threads = min(torch.get_num_threads(), blocks, shape[0] * shape[1] // _THREAD_ELEMENTS)
    if threads <= 1:
        part(0, shape[0])
        return
    step = math.ceil(blocks / threads) * block_rows
    pool = _pool(os.getpid(), torch.get_num_threads())
    others = [pool.submit(part, first, min(first + step, shape[0])) for first in range(step, shape[0], step)]
    try:
        part(0, step)
    finally:
        # Even on an error, no thread may write to the caller's memory after this returns.
        wait(others)
    for other in others:
        other.result()


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Reused threads: starting them takes about as long as a matrix. One pool per process: forks inherit none."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"fp8-{process}")


def _check_matrix(matrix: Tensor, block: Block) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"block fp8 is for matrices, not for shape {list(matrix.shape)}")
    if block[0] < 1 or block[1] < 1:
        raise ValueError(f"block size {block} is not positive")


def _expand(scale: Tensor, shape: Sequence[int], block: Block) -> Tensor:
    """Repeat scales to a matrix of the weight's shape."""
    wide = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return wide.repeat_interleave(block[1], 1)[:, : shape[1]]
