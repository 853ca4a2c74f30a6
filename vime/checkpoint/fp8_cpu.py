"""Block fp8 on the CPU, compiled by numba: one pass over memory, every number in a vector register.

Matrices come as the flat memory from their first element on, with the length of a row in elements (`stride`), so that
boxes of larger matrices need no copy. All functions release the GIL; they check nothing, `vime.checkpoint.fp8` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}

# Typed as their decorators leave them: numba gives intrinsics the signature of their own typing.
_intrinsic: Any = extending.intrinsic

I32, I16, I8, U8, F32 = np.int32, np.int16, np.int8, np.uint8, np.float32


@_intrinsic
def _bits(typing: Any, value: Any) -> Any:
    """The bits of an fp32 number."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), build


@_intrinsic
def _float(typing: Any, value: Any) -> Any:
    """The fp32 number of these bits."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), build


@_intrinsic
def _half(typing: Any, value: Any) -> Any:
    """The fp16 number of these bits, as fp32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), build


@_intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), build


@njit(**_OPTIONS)
def quantise(x, shift, x_stride, q, q_stride, scales, rows, columns, block_rows, block_columns, power_of_two):
    """e4m3 codes and scales of a matrix of `rows` x `columns`.

    x: int16 or int32, the bits of bf16 (`shift` 16) or fp32 (`shift` 0); q: uint8; scales: float32 [blocks down, blocks
    across]. Returns the first block that holds NaN or infinity, and stops there, or (-1, -1).
    """
    for down in range(scales.shape[0]):
        first, last = down * block_rows, min(rows, (down + 1) * block_rows)
        for across in range(scales.shape[1]):
            left, right = across * block_columns, min(columns, (across + 1) * block_columns)
            # Without their sign, floating-point numbers are in the order of their bits, NaN above infinity.
            largest = I32(0)
            for i in range(first, last):
                row = x[i * x_stride + left : i * x_stride + right]
                for j in range(row.shape[0]):
                    largest = max(largest, (I32(row[j]) << I32(shift)) & I32(0x7FFFFFFF))
            if largest >= I32(0x7F800000):
                return down, across
            scale = max(_float(largest), F32(1e-10)) / F32(448)
            if power_of_two and _bits(scale) & I32(0x7FFFFF):
                scale = _float((_bits(scale) & I32(0x7F800000)) + I32(0x800000))
            scales[down, across] = scale
            inverse = F32(1) / scale
            for i in range(first, last):
                row = x[i * x_stride + left : i * x_stride + right]
                codes = q[i * q_stride + left : i * q_stride + right]
                for j in range(row.shape[0]):
                    bits = I32(row[j]) << I32(shift)
                    size = _float(bits & I32(0x7FFFFFFF))
                    # The correctly rounded quotient: one Newton step with the rounded inverse (Markstein's theorem).
                    y = size * inverse
                    y = _fma(_fma(-y, scale, size), inverse, y)
                    # Beside 1.5 * 2^(e+20) a number of exponent e keeps 3 bits of mantissa, rounded to nearest even;
                    # with e at least -6 the subnormal codes come out too.
                    exponent = max(_bits(y) & I32(0x7F800000), I32(121 << 23))
                    magic = exponent + I32((20 << 23) | 0x400000)
                    mantissa = _bits(y + _float(magic)) - magic
                    code = (exponent >> I32(20)) - I32(121 << 3) + mantissa
                    codes[j] = U8(code | ((bits >> I32(24)) & I32(0x80)))
    return -1, -1


@njit(**_OPTIONS)
def dequantise_bf16(q, q_stride, scales, out, out_stride, rows, columns, block_rows, block_columns):
    """bf16 bits of e4m3 codes. q: int8; out: int16; scales: finite float32, no larger than 2^119.

    Returns the largest code without sign: 127 means that there was a NaN, for which `out` is wrong.
    """
    largest = I8(0)
    for i in range(rows):
        for across in range(scales.shape[1]):
            left, right = across * block_columns, min(columns, (across + 1) * block_columns)
            # e4m3's bits inside fp16's are a number 2^8 too small: their exponents' biases are 7 and 15.
            scale = scales[i // block_rows, across] * F32(256)
            codes = q[i * q_stride + left : i * q_stride + right]
            values = out[i * out_stride + left : i * out_stride + right]
            for j in range(codes.shape[0]):
                largest = max(largest, I8(codes[j] & I8(0x7F)))
                half = I16(I16(I16(codes[j]) << I16(7)) & I16(-0x4080))
                bits = _bits(_half(half) * scale)
                values[j] = I16((bits + I32(0x7FFF) + ((bits >> I32(16)) & I32(1))) >> I32(16))
    return largest


@njit(**_OPTIONS)
def dequantise_fp32(q, q_stride, scales, out, out_stride, rows, columns, block_rows, block_columns):
    """fp32 numbers of e4m3 codes, otherwise as `dequantise_bf16`."""
    largest = I8(0)
    for i in range(rows):
        for across in range(scales.shape[1]):
            left, right = across * block_columns, min(columns, (across + 1) * block_columns)
            scale = scales[i // block_rows, across] * F32(256)
            codes = q[i * q_stride + left : i * q_stride + right]
            values = out[i * out_stride + left : i * out_stride + right]
            for j in range(codes.shape[0]):
                largest = max(largest, I8(codes[j] & I8(0x7F)))
                half = I16(I16(I16(codes[j]) << I16(7)) & I16(-0x4080))
                values[j] = _half(half) * scale
    return largest
