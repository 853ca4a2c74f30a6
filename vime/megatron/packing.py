"""Packing of samples into micro-batches: pure functions of the samples' lengths.

A micro-batch holds up to `capacity` = CP x `--max-tokens-per-gpu` tokens; a longer sample is alone in its own, uncut.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

# A bin is closed with two more samples that fill it to within capacity / _TOLERANCE.
_TOLERANCE = 2048
# Candidates tried for the larger of the two, from the largest that fits downwards.
_PAIRS = 24
# With at most this many samples left, every bin is filled by exact subset sums.
_EXACT = 96
# A key is `length << 32 | index`: sorting keys sorts lengths, and ties by index, so packing is deterministic.
_ID_BITS = 32
_ID = (1 << _ID_BITS) - 1


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins that hold at most `capacity` each, in nearly as few as ⌈Σ/capacity⌉.

    Bin completion, largest sample first: the largest that fits follows until two samples close the gap; the last
    samples are placed by subset sums. Samples above the capacity are alone. Deterministic; O(n log n) in practice.
    """
    if capacity < 1:
        raise ValueError(f"capacity {capacity} is not positive")
    alone = [[index] for index, length in enumerate(lengths) if length > capacity]
    keys = sorted(length << _ID_BITS | index for index, length in enumerate(lengths) if length <= capacity)
    bins = []
    while len(keys) > _EXACT:
        bins.append(_complete(keys, capacity))
    while keys:
        bins.append(_best_subset(keys, capacity))
    return alone + bins


def _complete(keys: list[int], capacity: int) -> list[int]:
    """Take one bin's samples out of the sorted `length << 32 | index` keys."""
    first = keys.pop()
    chosen, gap = [first & _ID], capacity - (first >> _ID_BITS)
    tolerance = capacity // _TOLERANCE
    while keys:
        place = bisect_right(keys, gap << _ID_BITS | _ID) - 1
        if place < 0:
            break
        pair = _closing_pair(keys, place, gap, tolerance)
        if pair is not None:
            high, low = pair
            chosen += [keys.pop(high) & _ID, keys.pop(low) & _ID]
            break
        key = keys.pop(place)
        chosen.append(key & _ID)
        gap -= key >> _ID_BITS
    return chosen


def _closing_pair(keys: list[int], place: int, gap: int, tolerance: int) -> tuple[int, int] | None:
    """Positions (higher first) of two samples that fill the gap to within the tolerance; None when one is enough."""
    if gap - (keys[place] >> _ID_BITS) <= tolerance:
        return None
    for high in range(place, max(place - _PAIRS, 0), -1):
        rest = gap - (keys[high] >> _ID_BITS)
        low = bisect_right(keys, rest << _ID_BITS | _ID, 0, high) - 1
        if low < 0:
            continue
        if rest - (keys[low] >> _ID_BITS) <= tolerance:
            return high, low
        if low == high - 1:
            return None  # further pairs are smaller still
    return None


def _best_subset(keys: list[int], capacity: int) -> list[int]:
    """Take the largest sample and the subset of the others that fills the bin best, by a bit set of reachable sums."""
    first = keys.pop()
    gap = capacity - (first >> _ID_BITS)
    # Bit s of reachable[k]: some subset of the k largest remaining samples sums to s tokens. Kept for every k, so that
    # the walk back below can tell whether sample k is part of the best sum.
    within = (1 << (gap + 1)) - 1
    reachable = [1]
    for key in reversed(keys):
        reachable.append((reachable[-1] | reachable[-1] << (key >> _ID_BITS)) & within)
    total = reachable[-1].bit_length() - 1
    chosen, positions = [first & _ID], []
    for step in range(len(keys), 0, -1):
        position = len(keys) - step
        if not reachable[step - 1] >> total & 1:
            positions.append(position)
            total -= keys[position] >> _ID_BITS
    chosen += [keys[position] & _ID for position in positions]
    for position in sorted(positions, reverse=True):
        keys.pop(position)
    return chosen


@dataclass(frozen=True)
class Cost:
    """Time of a sample up to a factor: `length + length² / quadratic`; at `quadratic` attention weighs as the rest."""

    quadratic: float = 16384.0

    def __call__(self, length: int) -> float:
        return length + length * length / self.quadratic


def micro_batches(
    lengths: Sequence[int], capacity: int, ranks: int, *, multiple_of: int = 1, cost: Cost | None = None
) -> list[list[list[int]]]:
    """Micro-batches of every data-parallel rank: the same number on each, of nearly the same cost in all.

    Returns `[rank][micro-batch][sample index]`. The number is a multiple of `multiple_of` (what an interleaved pipeline
    asks for). Within a rank the costly micro-batches come first, so that a pipeline drains on short ones. With fewer
    samples than places some micro-batches are empty.
    """
    cost = cost or Cost()
    unit = ranks * multiple_of
    bins = pack(lengths, capacity)
    wanted = max(1, -(-len(bins) // unit)) * unit
    bins = _split(bins, lengths, wanted, cost)
    return balance([sum(cost(lengths[i]) for i in members) for members in bins], bins, ranks)


def fixed_micro_batches(
    lengths: Sequence[int], size: int, ranks: int, *, cost: Cost | None = None
) -> list[list[list[int]]]:
    """The same shape without dynamic batching: `size` samples a micro-batch, in their order."""
    cost = cost or Cost()
    bins = [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]
    wanted = max(1, -(-len(bins) // ranks)) * ranks
    bins += [[] for _ in range(wanted - len(bins))]
    return balance([sum(cost(lengths[i]) for i in members) for members in bins], bins, ranks)


def balance(costs: Sequence[float], bins: Sequence[list[int]], ranks: int) -> list[list[list[int]]]:
    """Deal bins to ranks, the same number to each: costliest first to the rank that has least and still has room."""
    room = len(bins) // ranks
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for number in sorted(range(len(bins)), key=lambda b: (-costs[b], b)):
        rank = min((r for r in range(ranks) if len(shares[r]) < room), key=lambda r: (loads[r], r))
        shares[rank].append(bins[number])
        loads[rank] += costs[number]
    return shares


def _split(bins: list[list[int]], lengths: Sequence[int], wanted: int, cost: Cost) -> list[list[int]]:
    """Halve the costliest bins of several samples until there are `wanted`, then add empty ones."""
    ordered = sorted(((sum(cost(lengths[i]) for i in members), members) for members in bins), key=lambda b: b[0])
    done: list[list[int]] = []
    while len(ordered) + len(done) < wanted and ordered:
        _, members = ordered.pop()
        if len(members) == 1:
            done.append(members)
            continue
        for half in _halves(members, lengths, cost):
            entry = (sum(cost(lengths[i]) for i in half), half)
            ordered.insert(bisect_left(ordered, entry[0], key=lambda b: b[0]), entry)
    result = done + [members for _, members in ordered]
    return result + [[] for _ in range(wanted - len(result))]


def _halves(members: list[int], lengths: Sequence[int], cost: Cost) -> tuple[list[int], list[int]]:
    halves: tuple[list[int], list[int]] = ([], [])
    loads = [0.0, 0.0]
    for index in sorted(members, key=lambda i: -lengths[i]):
        side = loads.index(min(loads))
        halves[side].append(index)
        loads[side] += cost(lengths[index])
    return halves
