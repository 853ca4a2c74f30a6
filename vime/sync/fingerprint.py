"""Fingerprints of tensors' bytes, computed where the tensor lies: a check of gigabytes takes milliseconds on a GPU.

They find faults, not forgers. The bytes are taken as 64-bit words w_i. The fingerprint is two sums over all words,
modulo 2^64: of w_i * k_i and of w_i * l_i, with odd k_i and l_i that are mixed from the word's place i. A word that
differs changes both sums, since a product with an odd number is one-to-one; several differences cancel in both by a
chance of about 2^-126.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_WORDS = 1 << 23
"""Words at a time: the work takes about 4 x 64 MB of memory."""
_MIX = (-0x61C8864680B583EB, -0x4B47D0C5C0A2D4A7, -0x3B314601E57A13AD, 0x2545F4914F6CDD1D)
"""Odd 64-bit constants as signed numbers."""


def fingerprint(*tensors: Tensor | None) -> str:
    """64 hexadecimal digits for each tensor, in order; None adds nothing. The same on every kind of device."""
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
    """(place of the first word, int64 words) of the bytes, in chunks; the last word is filled up with zeros."""
    whole = data.numel() // 8
    # Views of another type need an address that fits it.
    aligned = data if data.data_ptr() % 8 == data.storage_offset() % 8 == 0 else data.clone()
    words = aligned[: 8 * whole].view(torch.int64)
    for first in range(0, whole, CHUNK_WORDS):
        yield first, words[first : first + CHUNK_WORDS]
    if rest := data.numel() - 8 * whole:
        last = torch.zeros(8, dtype=torch.uint8, device=data.device)
        last[:rest] = data[8 * whole :]
        yield whole, last.view(torch.int64)


def _odd(place: Tensor, first: int, second: int) -> Tensor:
    """An odd number for every place, mixed by multiplications and shifts modulo 2^64."""
    mixed = (place + 1) * first
    mixed = (mixed ^ (mixed >> 29)) * second
    return (mixed ^ (mixed >> 32)) | 1
