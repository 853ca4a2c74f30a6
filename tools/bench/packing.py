"""Packing against first-fit, first-fit-decreasing, modified first-fit-decreasing and Karmarkar-Karp, in one run.

    python tools/bench/packing.py [--karmarkar-karp-most N]

Capacity 65,536 (CP 4 x 16,384); n = 256, 1024, 8192; log-normal and uniform lengths. Prints its ratios last and exits 1
where vime's packing takes more than 1.005 x ⌈Σ/C⌉ bins at n >= 1024, is over capacity, or is slower than modified
first-fit-decreasing at n = 8192.
"""

from __future__ import annotations

import argparse
import heapq
import math
import sys
import time
from collections.abc import Callable

import numpy as np

from vime.megatron.packing import pack

CAPACITY = 65_536
BOUND = 1.005
SEEDS = range(5)
Bins = list[list[int]]


def lengths(distribution: str, n: int, seed: int) -> list[int]:
    random = np.random.default_rng(seed)
    if distribution == "uniform":
        return random.integers(500, 32_769, n).tolist()
    drawn: list[int] = []
    while len(drawn) < n:
        values = np.rint(6000 * np.exp(0.9 * random.standard_normal(n))).astype(int)
        drawn += np.clip(values, 200, 32_768).tolist()
    return drawn[:n]


class FitTree:
    """First bin with room for a size: a tree of the largest free space."""

    def __init__(self, most: int, capacity: int) -> None:
        self.size = 1 << max(1, (most - 1).bit_length())
        self.free = [capacity] * (2 * self.size)

    def put(self, size: int) -> int:
        node = 1
        while node < self.size:
            node = 2 * node + (self.free[2 * node] < size)
        place = node - self.size
        self.free[node] -= size
        while node > 1:
            node //= 2
            self.free[node] = max(self.free[2 * node], self.free[2 * node + 1])
        return place


def first_fit(sizes: list[int], capacity: int) -> Bins:
    return _place(list(range(len(sizes))), sizes, capacity)


def first_fit_decreasing(sizes: list[int], capacity: int) -> Bins:
    return _place(sorted(range(len(sizes)), key=lambda i: -sizes[i]), sizes, capacity)


def _place(order: list[int], sizes: list[int], capacity: int) -> Bins:
    tree, bins = FitTree(len(sizes), capacity), [[] for _ in sizes]
    for index in order:
        bins[tree.put(sizes[index])].append(index)
    return [members for members in bins if members]


def modified_first_fit_decreasing(sizes: list[int], capacity: int) -> Bins:
    """Johnson and Garey 1985: large sizes open bins, medium ones and pairs of small ones join them, FFD the rest."""
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    large = [i for i in order if sizes[i] > capacity / 2]
    medium = [i for i in order if capacity / 3 < sizes[i] <= capacity / 2]
    small = [i for i in order if capacity / 6 < sizes[i] <= capacity / 3]
    tiny = [i for i in order if sizes[i] <= capacity / 6]
    bins = [[i] for i in large]
    free = [capacity - sizes[i] for i in large]
    for b in range(len(bins)):
        fit = next((i for i in medium if sizes[i] <= free[b]), None)
        if fit is not None:
            medium.remove(fit)
            bins[b].append(fit)
            free[b] -= sizes[fit]
    for b in range(len(bins) - 1, -1, -1):
        if len(bins[b]) > 1 or len(small) < 2 or sizes[small[-1]] + sizes[small[-2]] > free[b]:
            continue
        low = small.pop()
        fit = next(i for i in small if sizes[i] + sizes[low] <= free[b])
        small.remove(fit)
        bins[b] += [low, fit]
        free[b] -= sizes[low] + sizes[fit]
    rest = sorted(medium + small + tiny, key=lambda i: -sizes[i])
    tree = FitTree(len(bins) + len(rest), capacity)
    for b, room in enumerate(free):
        tree.free[tree.size + b] = room
    for node in range(tree.size - 1, 0, -1):
        tree.free[node] = max(tree.free[2 * node], tree.free[2 * node + 1])
    bins += [[] for _ in rest]
    for index in rest:
        bins[tree.put(sizes[index])].append(index)
    return [members for members in bins if members]


def karmarkar_karp(sizes: list[int], capacity: int) -> Bins:
    """Largest differencing into ⌈Σ/C⌉ sets: even sums, no regard for the capacity."""
    k = math.ceil(sum(sizes) / capacity)
    heap = [(-size, n, [(0, [])] * (k - 1) + [(size, [n])]) for n, size in enumerate(sizes)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, n, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = sorted(
            ((a[0] + b[0], a[1] + b[1]) for a, b in zip(first, reversed(second), strict=True)), key=lambda s: s[0]
        )
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], n, merged))
    return [members for _, members in heap[0][2] if members]


def timed(call: Callable[[list[int], int], Bins], sizes: list[int], runs: int = 3) -> tuple[Bins, float]:
    best = math.inf
    result: Bins = []
    for _ in range(runs):
        start = time.perf_counter()
        result = call(sizes, CAPACITY)
        best = min(best, time.perf_counter() - start)
    return result, best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--karmarkar-karp-most", type=int, default=1024, help="largest n for it; 8192 takes minutes")
    args = parser.parse_args()
    peers = {
        "vime": pack,
        "FF": first_fit,
        "FFD": first_fit_decreasing,
        "MFFD": modified_first_fit_decreasing,
        "KK": karmarkar_karp,
    }
    worst_bins, worst_time, failed = 0.0, 0.0, []
    print("distribution      n  method  bins/ideal (worst)  largest/C     ms (worst)")
    for distribution in ("lognormal", "uniform"):
        for n in (256, 1024, 8192):
            times: dict[str, float] = {}
            for name, method in peers.items():
                if name == "KK" and n > args.karmarkar_karp_most:
                    continue
                ratio, fill, spent = 0.0, 0.0, 0.0
                for seed in SEEDS if name != "KK" else range(1):
                    sizes = lengths(distribution, n, seed)
                    bins, seconds = timed(method, sizes, 1 if name == "KK" else 3)
                    assert sorted(i for members in bins for i in members) == list(range(n))
                    ratio = max(ratio, len(bins) / math.ceil(sum(sizes) / CAPACITY))
                    fill = max(fill, max(sum(sizes[i] for i in members) for members in bins) / CAPACITY)
                    spent = max(spent, seconds)
                times[name] = spent
                print(f"{distribution:>12} {n:6}  {name:>6}  {ratio:18.4f}  {fill:9.4f}  {spent * 1e3:13.1f}")
                if name == "vime":
                    worst_bins = max(worst_bins, ratio) if n >= 1024 else worst_bins
                    failed += [f"over capacity at n={n}"] if fill > 1 else []
            if n == 8192:
                worst_time = max(worst_time, times["vime"] / times["MFFD"])
    failed += [f"bins {worst_bins:.4f} x ideal"] if worst_bins > BOUND else []
    failed += [f"time {worst_time:.2f} x MFFD"] if worst_time > 1 else []
    print(
        f"bins at n >= 1024: {worst_bins:.4f} x ideal (at most {BOUND}); "
        f"time at n = 8192: {worst_time:.3f} x MFFD (at most 1)"
    )
    if failed:
        print("falls short: " + "; ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
