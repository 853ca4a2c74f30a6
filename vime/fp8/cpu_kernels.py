"""Block-fp8 kernels for the CPU, compiled by numba: vectorised, one pass over memory.

A matrix is passed as the flat memory from its first element, with its row stride in elements (`stride`), so that boxes
of larger matrices need no copy. All functions release the GIL. Arguments are checked in `vime.fp8.quantise`, not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}

# Any, because callers see the signature that each intrinsic returns, not that of its Python function.
_intrinsic: Any = extending.intrinsic

I32, F32 = np.int32, np.float32
_PANEL_BYTES = 1 << 21


@_intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """Bits of an fp32 number as int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


@_intrinsic
def _float(typing: Any, value: Any) -> Any:
    """The fp32 number with these int32 bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


# Arithmetic inside vectorised loops uses intrinsics: numba widens every integer operation to 64 bits, which would cut
# vectors of 16 or 32 numbers to 8.


@_intrinsic
def _size(typing: Any, bits: Any) -> Any:
    """Clear the sign in the bits of a floating-point number; same type."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        return builder.and_(args[0], kind((1 << (kind.width - 1)) - 1))

    return bits(bits), build


@_intrinsic
def _larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of two signed numbers of one type."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.icmp_signed(">", *args), *args)

    return a(a, a), build


@_intrinsic
def _wide(typing: Any, bits: Any) -> Any:
    """Widen the bits of a bf16 (int16) or fp32 (int32) number to those of fp32 (int32)."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widened(builder, args[0])

    return types.int32(bits), build


def _widened(builder: Any, bits: Any) -> Any:
    word = ir.IntType(32)
    return builder.shl(builder.zext(bits, word), word(16)) if bits.type.width == 16 else bits


@_intrinsic
def _code(typing: Any, bits: Any, scale: Any, inverse: Any) -> Any:
    """The e4m3 code (uint8) of a number (bf16 or fp32 bits) divided by `scale`; `inverse` is 1 / scale, rounded."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, real = ir.IntType(32), ir.FloatType()
        value, scale, inverse = _widened(builder, args[0]), args[1], args[2]
        size = builder.bitcast(builder.and_(value, word(0x7FFFFFFF)), real)
        # The correctly rounded quotient: one Newton step with the rounded inverse (Markstein's theorem).
        y = builder.fmul(size, inverse)
        y = builder.fma(builder.fma(builder.fneg(y), scale, size), inverse, y)
        # Adding 1.5 * 2^(e+20) rounds a number of exponent e to 3 bits of mantissa, to nearest even; clamping e to at
        # least -6 also gives the subnormal codes.
        exponent = builder.and_(builder.bitcast(y, word), word(0x7F800000))
        exponent = builder.select(builder.icmp_signed(">", exponent, word(121 << 23)), exponent, word(121 << 23))
        magic = builder.add(exponent, word((20 << 23) | 0x400000))
        mantissa = builder.sub(builder.bitcast(builder.fadd(y, builder.bitcast(magic, real)), word), magic)
        code = builder.add(builder.sub(builder.lshr(exponent, word(20)), word(121 << 3)), mantissa)
        sign = builder.and_(builder.lshr(value, word(24)), word(0x80))
        return builder.trunc(builder.or_(code, sign), ir.IntType(8))

    return types.uint8(bits, types.float32, types.float32), build


@_intrinsic
def _scaled(typing: Any, code: Any, scale: Any) -> Any:
    """Decode an e4m3 code (int8, not NaN) to fp32 times the scale; `scale` must be passed 2^8 times as large."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = ir.IntType(16)
        # Placed in fp16, e4m3's bits are a number 2^8 too small: the exponent biases are 7 and 15.
        bits = builder.and_(builder.shl(builder.sext(args[0], half), half(7)), half(-0x4080))
        return builder.fmul(builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType()), args[1])

    return types.float32(types.int8, types.float32), build


@_intrinsic
def _bf16(typing: Any, value: Any) -> Any:
    """Round a finite fp32 number to bf16 bits (int16), ties to even."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.lshr(builder.add(builder.add(bits, word(0x7FFF)), odd), word(16))
        return builder.trunc(rounded, ir.IntType(16))

    return types.int16(types.float32), build


@_intrinsic
def _prefetch(typing: Any, x: Any, at: Any) -> Any:
    """Prefetch the cache line of an element, which may be outside the array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.call(fetch, [builder.bitcast(builder.gep(data, [args[1]]), byte), word(0), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(x, types.uint64), build


@njit(**_OPTIONS)
def quantise(x, x_stride, q, q_stride, scales, rows, columns, block_rows, block_columns, power_of_two):
    """Quantise a matrix of `rows` x `columns` to e4m3 codes and scales.

    x: int16 or int32, the bits of bf16 or fp32; q: uint8; scales: float32 [blocks down, blocks across]. Stops at the
    first block that holds NaN or infinity and returns its index, else returns (-1, -1).
    """
    # Panels of neighbouring blocks: long runs of memory, yet small enough to stay cached for the second pass, which
    # prefetches the next panel while it computes.
    step = max(1, _PANEL_BYTES // (block_rows * block_columns * x.itemsize))
    largest = np.empty(step * block_columns, x.dtype)
    inverses = np.empty(scales.shape[1], np.float32)
    for down in range(scales.shape[0]):
        first, last = down * block_rows, min(rows, (down + 1) * block_rows)
        for panel in range(0, scales.shape[1], step):
            stop = min(panel + step, scales.shape[1])
            left, right = panel * block_columns, min(columns, stop * block_columns)
            largest[:] = 0
            for i in range(first, last):
                _enlarge(largest, x, np.uint64(i * x_stride + left), np.uint64(right - left))
            for across in range(panel, stop):
                start = (across - panel) * block_columns
                scale = _scale_of(largest[start : min(right - left, start + block_columns)], power_of_two)
                if not scale < np.inf:
                    return down, across
                scales[down, across], inverses[across] = scale, F32(1) / scale
            ahead = right - left if stop < scales.shape[1] else block_rows * x_stride - left
            mine = slice(panel, stop)
            for i in range(first, last):
                at, to = i * x_stride + left, i * q_stride + left
                _encode(x, at, ahead, q, to, scales[down, mine], inverses[mine], right - left, block_columns)
    return -1, -1


@njit(inline="always", **_OPTIONS)
def _encode(x, at, ahead, q, to, scales, inverses, columns, block_columns):
    """Encode one row of a panel, and prefetch the row `ahead` elements further."""
    for across in range(scales.shape[0]):
        start = across * block_columns
        first, target = np.uint64(at + start), np.uint64(to + start)
        for line in range(0, block_columns, 64 // x.itemsize):
            _prefetch(x, np.uint64(at + start + ahead + line))
        scale, inverse = scales[across], inverses[across]
        for j in range(np.uint64(min(columns, start + block_columns) - start)):
            q[target + j] = _code(x[first + j], scale, inverse)


@njit(inline="always", **_OPTIONS)
def _enlarge(largest, x, at, length):
    """Raise `largest` to the magnitudes of `x[at:at + length]`. As bits, magnitudes sort correctly, NaN above infinity.

    Unsigned indices avoid numba's test for negative ones.
    """
    for j in range(length):
        largest[j] = _larger(largest[j], _size(x[at + j]))


@njit(inline="always", **_OPTIONS)
def _scale_of(largest, power_of_two):
    """Scale of a block from its columns' largest magnitudes; infinite if the block holds NaN or infinity."""
    amax = largest[0]
    for j in range(largest.shape[0]):
        amax = _larger(amax, largest[j])
    bits = _wide(amax)
    if bits >= I32(0x7F800000):
        return F32(np.inf)
    scale = max(_float(bits), F32(1e-10)) / F32(448)
    if power_of_two and _bits(scale) & I32(0x7FFFFF):
        scale = _float(I32((_bits(scale) & I32(0x7F800000)) + I32(0x800000)))
    return scale


@njit(**_OPTIONS)
def dequantise_bf16(q, q_stride, scales, out, out_stride, rows, columns, block_rows, block_columns):
    """Dequantise e4m3 codes to bf16 bits. q: int8; out: int16; scales: finite float32, at most 2^119.

    Returns the largest code without sign: 127 means that a code was NaN, where `out` is wrong.
    """
    largest = np.int8(0)
    for i in range(rows):
        for across in range(scales.shape[1]):
            left, right = across * block_columns, min(columns, (across + 1) * block_columns)
            scale = scales[i // block_rows, across] * F32(256)
            codes = q[i * q_stride + left : i * q_stride + right]
            values = out[i * out_stride + left : i * out_stride + right]
            for j in range(codes.shape[0]):
                largest = _larger(largest, _size(codes[j]))
                values[j] = _bf16(_scaled(codes[j], scale))
    return largest


@njit(**_OPTIONS)
def dequantise_fp32(q, q_stride, scales, out, out_stride, rows, columns, block_rows, block_columns):
    """Dequantise e4m3 codes to fp32 (`out`: float32), otherwise like `dequantise_bf16`."""
    largest = np.int8(0)
    for i in range(rows):
        for across in range(scales.shape[1]):
            left, right = across * block_columns, min(columns, (across + 1) * block_columns)
            scale = scales[i // block_rows, across] * F32(256)
            codes = q[i * q_stride + left : i * q_stride + right]
            values = out[i * out_stride + left : i * out_stride + right]
            for j in range(codes.shape[0]):
                largest = _larger(largest, _size(codes[j]))
                values[j] = _scaled(codes[j], scale)
    return largest
