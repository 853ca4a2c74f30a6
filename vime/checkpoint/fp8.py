"""Block fp8 (e4m3, one scale a block), quantised and dequantised on CPU or GPU.

The format is DeepSeek-V3's: `scale = max(amax, 1e-10) / 448` of every block, `q = e4m3(x / scale)`, stored as `<name>`
(float8_e4m3fn [M, N]) beside `<name>_scale_inv` (fp32 [ceil(M/bm), ceil(N/bn)]). Blocks at the edges are smaller,
nothing is padded. With `ue8m0` the scale is rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vime.checkpoint.fp8_format import SCALE_SUFFIX, Block, is_quantised, scale_name, scale_shape
from vime.errors import VimeError

__all__ = [
    "SCALE_SUFFIX",
    "Block",
    "NotFinite",
    "block_scales",
    "dequantise",
    "is_quantised",
    "quantise",
    "scale_name",
    "scale_shape",
]

FP8_MAX = 448.0
MIN_AMAX = 1e-10

# Elements that are worked on at a time: their fp32 and 16-bit copies stay in a core's L2 cache.
_STRIP = 1 << 17
# fp16's exponent bias is 15, e4m3's is 7: an e4m3 number put into fp16's bits is 2^8 too small.
_REBIAS = 256.0
_MAX_REBIASED_SCALE = 2.0**119


class NotFinite(VimeError):
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

    Bit-equal with dividing every block in fp32 by its scale and rounding to nearest even. `out` takes the e4m3 matrix.
    Raises NotFinite, with `name` in the text, for NaN or infinity.
    """
    _check_matrix(weight, block)
    scale = block_scales(weight, block, scale_format=scale_format, name=name)
    q = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device) if out is None else out
    if weight.is_cuda:
        q.copy_(weight.to(torch.float32) / _expand(scale, weight.shape, block))
    else:
        _quantise_strips(weight, scale, block, q.view(torch.int8))
    return q, scale


def block_scales(weight: Tensor, block: Block, *, scale_format: str = "float32", name: str = "weight") -> Tensor:
    """fp32 scales of a matrix's blocks: `max(amax, 1e-10) / 448`, rounded up to a power of two for `ue8m0`."""
    rows, columns = scale_shape(weight.shape, block)
    amax = torch.empty(rows, columns, dtype=torch.float32, device=weight.device)
    pad = columns * block[1] - weight.shape[1]
    across = torch.zeros(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
    for row, part in _strips(weight.shape, block):
        torch.maximum(across[row], _largest(weight[part]), out=across[row])
    across = torch.nn.functional.pad(across, (0, pad)) if pad else across
    torch.amax(across.view(rows, columns, block[1]), dim=2, out=amax)
    if not bool(torch.isfinite(amax).all()):
        at = (~torch.isfinite(amax)).nonzero()[0].tolist()
        raise NotFinite(f"{name} holds NaN or infinity in its block {tuple(at)} of {rows} x {columns}")
    scale = amax.clamp_(min=MIN_AMAX).div_(FP8_MAX)
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    return scale


def _largest(strip: Tensor) -> Tensor:
    """fp32 [N]: the largest absolute value of each column; NaN where there is one."""
    if strip.dtype == torch.bfloat16:
        # Without their sign, bf16 numbers are in the order of their bits, NaN last; integers reduce 5 times as fast.
        return (strip.view(torch.int16) & 0x7FFF).amax(dim=0).view(torch.bfloat16).to(torch.float32)
    return strip.abs().amax(dim=0).to(torch.float32)


def dequantise(
    q: Tensor,
    scale: Tensor,
    block: Block = (128, 128),
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """`dtype(fp32(q) * scale)`, bit for bit, of an e4m3 matrix [M, N] with scales [ceil(M/bm), ceil(N/bn)].

    Scales may be fp32, bf16 or float8_e8m0fnu. `out` ([M, N] of `dtype`) saves the allocation.
    """
    _check_matrix(q, block)
    if tuple(scale.shape) != scale_shape(q.shape, block):
        raise ValueError(
            f"scales {list(scale.shape)} do not fit a matrix {list(q.shape)} in blocks of {block[0]} x {block[1]}: "
            f"expected {list(scale_shape(q.shape, block))}"
        )
    scale = scale.to(torch.float32)
    out = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    # A scale that would overflow when rebiased never occurs in a real checkpoint; the plain formula is right for it.
    if q.is_cuda or not bool((scale.abs() <= _MAX_REBIASED_SCALE).all()):
        return out.copy_(q.to(torch.float32) * _expand(scale, q.shape, block))
    _dequantise_strips(q, scale, block, out)
    return out


def _check_matrix(matrix: Tensor, block: Block) -> None:
    if matrix.dim() != 2:
        raise ValueError(f"block fp8 is for matrices, not for shape {list(matrix.shape)}")
    if block[0] < 1 or block[1] < 1:
        raise ValueError(f"block size {block} is not positive")


def _expand(scale: Tensor, shape: Sequence[int], block: Block) -> Tensor:
    """Scales as a matrix of the weight's shape."""
    wide = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return wide.repeat_interleave(block[1], 1)[:, : shape[1]]


def _strips(shape: Sequence[int], block: Block) -> Iterator[tuple[int, slice]]:
    """(block row, rows) of pieces that fit into the cache and never cross a block row."""
    rows = max(1, min(block[0], _STRIP // max(1, shape[1])))
    for first in range(0, shape[0], block[0]):
        last = min(first + block[0], shape[0])
        for start in range(first, last, rows):
            yield first // block[0], slice(start, min(start + rows, last))


def _dequantise_strips(q: Tensor, scale: Tensor, block: Block, out: Tensor) -> None:
    """e4m3 bits moved into fp16's, which the processor widens; 17 times as fast as torch's own e4m3 conversion."""
    columns = q.shape[1]
    codes = q.view(torch.int8)
    wide = (scale * _REBIAS).repeat_interleave(block[1], 1)[:, :columns]
    largest = max(1, min(block[0], _STRIP // max(1, columns)))
    bits = torch.empty(largest, columns, dtype=torch.int16)
    values = torch.empty(largest, columns, dtype=torch.float32)
    for row, rows in _strips(q.shape, block):
        part, n = codes[rows], rows.stop - rows.start
        # Sign-extended and shifted: sign in bit 15, exponent and mantissa in bits 7 to 13.
        bits[:n].copy_(part).bitwise_left_shift_(7).bitwise_and_(-0x4080)
        values[:n].copy_(bits[:n].view(torch.float16)).mul_(wide[row])
        out[rows].copy_(values[:n])
        if int((part & 0x7F).max()) == 0x7F:
            out[rows].masked_fill_((part == 0x7F) | (part == -1), float("nan"))


def _quantise_strips(weight: Tensor, scale: Tensor, block: Block, codes: Tensor) -> None:
    """Rounds in fp32 by adding and taking away a number whose last bit is the wanted one, then packs through fp16."""
    columns = weight.shape[1]
    wide = scale.repeat_interleave(block[1], 1)[:, :columns]
    largest = max(1, min(block[0], _STRIP // max(1, columns)))
    values = torch.empty(largest, columns, dtype=torch.float32)
    magic = torch.empty(largest, columns, dtype=torch.int32)
    half = torch.empty(largest, columns, dtype=torch.float16)
    sign = torch.empty(largest, columns, dtype=torch.int16)
    for row, rows in _strips(weight.shape, block):
        n = rows.stop - rows.start
        x, m, h, s = values[:n], magic[:n], half[:n], sign[:n]
        x.copy_(weight[rows]).div_(wide[row])
        # Taken now: the rounding below makes a positive zero of what is smaller than the smallest number.
        torch.bitwise_right_shift(x.view(torch.int32), 24, out=m)
        s.copy_(m).bitwise_and_(-0x80)
        # 1.5 * 2^(e+20), with e at least -6: beside it a number of exponent e keeps 3 bits of mantissa, and what is
        # below 2^-6 (e4m3's subnormals) keeps multiples of 2^-9.
        torch.bitwise_and(x.view(torch.int32), 0x7F800000, out=m)
        m.clamp_(min=121 << 23).add_((20 << 23) | 0x400000)
        x.add_(m.view(torch.float32)).sub_(m.view(torch.float32))
        h.copy_(x.mul_(1 / _REBIAS))
        b = h.view(torch.int16)
        b.bitwise_right_shift_(7).bitwise_and_(0x7F).bitwise_or_(s)
        codes[rows].copy_(b)
