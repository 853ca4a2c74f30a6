"""Fingerprints of tensors' bytes, computed on the tensor's device: gigabytes take milliseconds on a GPU.

They detect faults, not forgery. The bytes are read as 64-bit words w_i. The fingerprint is two sums over all words,
modulo 2^64: of w_i * k_i and of w_i * l_i, with odd k_i and l_i hashed from the word's index i. One differing word
changes both sums, because multiplying by an odd number is one-to-one; several differences cancel in both sums with a
probability of about 2^-126.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_WORDS = 1 << 23
"""Words processed at once; needs about 4 x 64 MB of memory."""
_MIX = (-0x61C8864680B583EB, -0x4B47D0C5C0A2D4A7, -0x3B314601E57A13AD, 0x2545F4914F6CDD1D)
"""Odd 64-bit constants as signed numbers."""


def fingerprint(*tensors: Tensor | None) -> str:
    """64 hexadecimal digits for each tensor, in order; None adds nothing. Equal on every kind of device."""
    return "".join(_one(tensor) for tensor in tensors if tensor is not None)


def _one(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)
    for first, words in _words(data):
        place = torch.arange(first, first + words.numel(), device=data.device)
        for lane in range(2):
            sums[lane] += (words * _odd(place, _MIX[2 * lane], _MIX[2 * lane + 1])).sum()
    low, high = (value & 0xFFFFFFFFFFFFFFFF for value in sums.tolist())
    return f"{low:016x}{high:016x}{data.numel():032x}"


def _words(data: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Chunks (index of the first word, int64 words) of the bytes; the last word is padded with zeros."""
    whole = data.numel() // 8
    # An int64 view needs an address and an offset that are multiples of 8.
    aligned = data if data.data_ptr() % 8 == data.storage_offset() % 8 == 0 else data.clone()
    words = aligned[: 8 * whole].view(torch.int64)
    for first in range(0, whole, CHUNK_WORDS):
        yield first, words[first : first + CHUNK_WORDS]
    if rest := data.numel() - 8 * whole:
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[:rest] = data[8 * whole :]
        yield whole, last.view(torch.int64)


def _odd(place: Tensor, first: int, second: int) -> Tensor:
    """Hash each index to an odd number, by multiplications and shifts modulo 2^64."""
    mixed = (place + 1) * first
    mixed = (mixed ^ (mixed >> 29)) * second
    return (mixed ^ (mixed >> 32)) | 1
