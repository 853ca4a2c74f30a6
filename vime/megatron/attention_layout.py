"""Packed sequences and context parallelism: which token lies where, as plain indices.

A packed micro-batch is all sequences behind each other, each padded to a multiple of 2 x cp. With context parallelism
each is cut into 2 cp chunks and rank r holds the chunks r and 2 cp - 1 - r, so that causal attention costs every rank
the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Sequences in one batch of attention differ in length by at most this factor, or by the absolute slack.
_LENGTH_FACTOR = 1.2
_LENGTH_SLACK = 16


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences of like length that are attended to as one batch."""

    queries: torch.Tensor
    """[batch, q length], int64: tokens of this rank; filled up with 0."""
    real: torch.Tensor
    """[batch, q length], bool: false where `queries` is filled up."""
    keys: torch.Tensor
    """[batch, k length], int64: tokens of all context-parallel ranks behind each other; filled up with 0."""
    mask: torch.Tensor | None
    """[batch, 1, q length, k length], bool: what a query sees; None where it is plainly causal."""


def local_positions(length: int, rank: int, size: int) -> np.ndarray:
    """Positions within a sequence of `length` (padded) tokens that a context-parallel rank holds, in its order."""
    if size == 1:
        return np.arange(length)
    half = length // (2 * size)
    first, second = rank * half, (2 * size - 1 - rank) * half
    return np.concatenate([np.arange(first, first + half), np.arange(second, second + half)])


def local_tokens(lengths: Sequence[int], rank: int, size: int) -> np.ndarray:
    """Indices into the packed micro-batch of the tokens that a context-parallel rank holds, in its order."""
    starts = np.cumsum([0, *lengths])
    parts = [start + local_positions(length, rank, size) for start, length in zip(starts, lengths, strict=False)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of the sequences, longest first, cut into groups of like length."""
    groups: list[list[int]] = []
    longest = 0
    for number in sorted((n for n in range(len(lengths)) if lengths[n]), key=lambda n: -lengths[n]):
        if not groups or lengths[number] * _LENGTH_FACTOR + _LENGTH_SLACK < longest:
            groups.append([])
            longest = lengths[number]
        groups[-1].append(number)
    return groups


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, width - len(row))) for row in rows])


def build_groups(lengths: Sequence[int], rank: int, size: int, device: torch.device) -> list[AttentionGroup]:
    """The groups of a context-parallel rank for sequences of these padded lengths; together they have every token."""
    local = [length // size for length in lengths]
    starts = np.cumsum([0, *local])
    total = int(starts[-1])
    found = []
    for numbers in _like_lengths(lengths):
        queries = [starts[n] + np.arange(local[n]) for n in numbers]
        real = [np.ones(local[n], bool) for n in numbers]
        # Key i of rank r lies at r x total + i; sorted by position, so that a sequence's keys stand in its own order.
        keys = []
        for n in numbers:
            places = np.concatenate([r * total + starts[n] + np.arange(local[n]) for r in range(size)])
            order = np.argsort(np.concatenate([local_positions(lengths[n], r, size) for r in range(size)]))
            keys.append(places[order])
        mask = None
        if size > 1:
            seen = _stack([local_positions(lengths[n], rank, size) for n in numbers])
            mask = torch.from_numpy(seen[:, :, None] >= np.arange(max(lengths[n] for n in numbers))).unsqueeze(1)
            mask = mask.to(device)
        index, filled, places = (torch.from_numpy(_stack(rows)).to(device) for rows in (queries, real, keys))
        found.append(AttentionGroup(index, filled, places, mask))
    return found


def attention_groups(packed: Any, rank: int, size: int) -> list[AttentionGroup]:
    """The groups of a micro-batch, kept on its `PackedSeqParams` so that all layers share them."""
    kept = getattr(packed, "vime_attention_groups", None)
    if kept is None:
        padded = packed.cu_seqlens_q_padded if packed.cu_seqlens_q_padded is not None else packed.cu_seqlens_q
        lengths = padded.diff().tolist()
        kept = packed.vime_attention_groups = build_groups(lengths, rank, size, padded.device)
    return kept
