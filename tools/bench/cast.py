"""The cast from block fp8 to bf16 on processors against its limit and its peer, in one run, on a generated checkpoint.

    python tools/bench/cast.py --folder /scratch/bench [--gigabytes 4.1]

The checkpoint has DeepSeek-V3's shapes. With one thread and with all cores:
- limit: a plain copy, which reads the same files and writes as many bytes, from the disk and to the disk (fsync)
- peer: torch's own upcast and multiply of the same matrices, both in memory, and both without any files
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from checkpoint_io import PIECE, PeakMemory, drop_pages, generate, weight_bytes

from vime.checkpoint.cast import cast_to_bf16
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.safetensors_file import same_bytes
from vime.fp8.quantise import dequantise

MIN_BANDWIDTH, MIN_SPEEDUP, MAX_TENSORS = 0.5, 5.0, 2.0
# Matrices whose upcast is timed: enough to leave every cache.
TIMED = 24


def plain_copy(source: Path, target: Path, out_bytes: int) -> float:
    """Seconds to read the source's files, a piece at a time, and to write as many bytes as the cast does."""
    ratio = out_bytes / weight_bytes(source, "*.safetensors")
    buffer = memoryview(bytearray(2 * PIECE))
    started = time.perf_counter()
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream, (target / path.name).open("wb", buffering=0) as out:
            owed = 0.0
            while count := stream.readinto(buffer[:PIECE]):
                owed += count * ratio
                owed -= out.write(buffer[: min(len(buffer), int(owed))])
            os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def upcast(checkpoint: HFCheckpoint, name: str) -> torch.Tensor:
    """The peer: the formula as one writes it down."""
    scale = checkpoint.scale(name).repeat_interleave(128, 0).repeat_interleave(128, 1)
    stored = checkpoint.stored(name)
    return (stored.to(torch.float32) * scale[: stored.shape[0], : stored.shape[1]]).to(torch.bfloat16)


def timed(names: Sequence[str], make: Callable[[str], object]) -> float:
    started = time.perf_counter()
    for name in names:
        make(name)
    return time.perf_counter() - started


def speedup(checkpoint: HFCheckpoint, names: Sequence[str], threads: int) -> float:
    """How much faster than the peer the same matrices are made, in memory."""
    torch.set_num_threads(threads)
    out = torch.empty(
        max(checkpoint.info(name).end - checkpoint.info(name).begin for name in names), dtype=torch.bfloat16
    )

    def ours(name: str) -> torch.Tensor:
        stored = checkpoint.stored(name)
        place = out[: stored.numel()].view(stored.shape)
        return dequantise(stored, checkpoint.scale(name), checkpoint.block, out=place)

    # Pages of the source come into memory first.
    timed(names, ours)
    best = min(timed(names, ours) for _ in range(3))
    peer = min(timed(names, lambda name: upcast(checkpoint, name)) for _ in range(2))
    count = sum(checkpoint.stored(name).numel() for name in names)
    print(f"{threads} threads, in memory: {count / best / 1e9:.2f} Gparam/s, peer {count / peer / 1e9:.3f}")
    return peer / best


def is_bit_equal(source: Path, made: Path) -> bool:
    """Whether every tensor of the output is the peer's, bit for bit."""
    fp8, bf16 = HFCheckpoint(source), HFCheckpoint(made)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return all(
        same_bytes(bf16.stored(name), upcast(fp8, name) if fp8.is_quantised(name) else fp8.stored(name))
        for name in bf16.tensors
    )


def bandwidth(folder: Path, threads: int, rounds: int) -> tuple[float, float]:
    """Of the cast, as a share of the copy's; and memory over the largest tensor of a thread."""
    source, out = folder / "fp8", folder / "bf16"
    largest = max(info.end - info.begin for info in HFCheckpoint(source).tensors.values())
    ratios, memory_of = [], 0.0
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        drop_pages(source)
        with PeakMemory() as memory:
            started = time.perf_counter()
            cast_to_bf16(source, out, threads=threads, device="cpu")
            cast = time.perf_counter() - started
        memory_of = max(memory_of, memory.grown / (largest * threads))
        out_bytes = weight_bytes(out, "*.safetensors")
        drop_pages(source)
        copy = plain_copy(source, folder / "plain", out_bytes)
        ratios.append(copy / cast)
        moved = (weight_bytes(source, "*.safetensors") + out_bytes) / 1e9
        print(
            f"{threads} threads: {moved:.1f} GB cast in {cast:.1f} s ({moved / cast:.2f} GB/s), copied in {copy:.1f} s"
        )
    return statistics.median(ratios), memory_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; what is made there is removed")
    parser.add_argument("--gigabytes", type=float, default=4.1, help="of the fp8 checkpoint, at least")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the generated checkpoint for another run")
    arguments = parser.parse_args()
    folder, cores = arguments.folder, len(os.sched_getaffinity(0))
    source = folder / "fp8"
    folder.mkdir(parents=True, exist_ok=True)
    said, good = [], True
    try:
        if not source.exists():
            generate(source, arguments.gigabytes)
        for threads in sorted({1, cores}):
            share, memory = bandwidth(folder, threads, arguments.rounds)
            checkpoint = HFCheckpoint(source)
            names = [name for name in checkpoint.tensors if checkpoint.is_quantised(name)][-TIMED:]
            faster = speedup(checkpoint, names, threads)
            good &= share >= MIN_BANDWIDTH and faster >= MIN_SPEEDUP and memory <= MAX_TENSORS
            said.append(f"{threads} threads: bandwidth / plain copy's: {share:.2f} (at least {MIN_BANDWIDTH})")
            said.append(
                f"{threads} threads: speed / torch's upcast and multiply: {faster:.1f} (at least {MIN_SPEEDUP})"
            )
            said.append(f"{threads} threads: memory / (largest tensor x threads): {memory:.2f} (at most {MAX_TENSORS})")
        equal = is_bit_equal(source, folder / "bf16")
        said.append(f"bit-equal with the peer: {equal}")
    finally:
        shutil.rmtree(folder / "bf16", ignore_errors=True)
        shutil.rmtree(folder / "plain", ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(source, ignore_errors=True)
    print("\n".join(said))
    return 0 if good and equal else 1


if __name__ == "__main__":
    sys.exit(main())
