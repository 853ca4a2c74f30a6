"""Layout of a message between trainer ranks: boxes in the schedule's order, each followed by its scales if it was
quantised on the shard, all padded to ALIGNMENT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vime.fp8.format import scale_shape
from vime.sync.parts import Entry, Move, padded

Block = tuple[int, int]


def message_bytes(moves: Sequence[Move], block: Block) -> int:
    """Size in bytes of a message with these moves."""
    return sum(sum(_sizes(move, block)) for move in moves)


def message_parts(message: Tensor, moves: Sequence[Move], block: Block) -> Iterator[tuple[Tensor, Tensor | None]]:
    """For each move (numbers of the box's shape, scales or None), as views of a uint8 message."""
    start = 0
    for move in moves:
        size, scale_size = _sizes(move, block)
        dtype = _sent_as(move)
        count = math.prod(move.piece.size) * dtype.itemsize
        numbers = message[start : start + count].view(dtype).view(move.piece.size)
        start += size
        scales = None
        if scale_size:
            shape = scale_shape(move.piece.size, block)
            scales = message[start : start + 4 * math.prod(shape)].view(torch.float32).view(shape)
        start += scale_size
        yield numbers, scales


def scale_box(move: Move, block: Block) -> tuple[slice, ...]:
    """Index of an aligned box's blocks in the matrix of scales."""
    return tuple(
        slice(start // size, -(-(start + length) // size))
        for start, length, size in zip(move.piece.start, move.piece.size, block, strict=True)
    )


def torch_type(entry: Entry) -> torch.dtype:
    """torch type of a tensor in the stream."""
    return getattr(torch, entry.dtype)


def _sent_as(move: Move) -> torch.dtype:
    """Type of a box in a message: fp32 if its blocks cross shards, because the publisher quantises it."""
    return torch.float32 if move.entry.quantised and not move.on_shard else torch_type(move.entry)


def _sizes(move: Move, block: Block) -> tuple[int, int]:
    """Padded bytes of a box and of its scales (0 without scales)."""
    size, scales = math.prod(move.piece.size) * _sent_as(move).itemsize, 0
    if move.entry.quantised and move.on_shard:
        scales = 4 * math.prod(scale_shape(move.piece.size, block))
    return padded(size), padded(scales)
