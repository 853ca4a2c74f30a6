"""The cast tool on one GPU, from and to files in memory, against the slower direction of PCIe.

    python tools/bench/gpu/cast.py [--gigabytes 7] [--folder /dev/shm]

Generates a block-fp8 checkpoint with DeepSeek-V3's shapes, casts it on the GPU, compares tensors with the CPU path, and
measures pinned copies in both directions in the same run. Prints its ratios last and exits 1 where one falls
short: at least 0.8 of the slower direction, at most 4 GiB of GPU memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint_io import generate

from vime.checkpoint.cast import cast_to_bf16
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.safetensors_file import raw_bytes
from vime.fp8.quantise import dequantise

FLOOR, MOST_GPU_BYTES = 0.8, 4 * 2**30


def copy_rates(size: int = 2**30) -> dict[str, float]:
    """Bytes a second of pinned copies in each direction alone; median of five."""
    host = torch.empty(size, dtype=torch.uint8).pin_memory()
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    rates = {}
    for name, target, source in (("host to device", device, host), ("device to host", host, device)):
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        rates[name] = size / statistics.median(times[1:])
    return rates


def file_rates(folder: Path, threads: int, size: int = 2**29) -> dict[str, float]:
    """Bytes a second of as many threads, a new file each: only its memory taken from the kernel, and written too.

    Both are limits that a cast into files in memory has beside PCIe.
    """
    data = raw_bytes(torch.randint(0, 255, (2**22,), dtype=torch.uint8))

    def allocate(number: int) -> None:
        with (folder / f"write{number}").open("wb", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def write(number: int) -> None:
        with (folder / f"write{number}").open("wb", buffering=0) as file:
            for _ in range(size // len(data)):
                file.write(data)

    rates = {}
    for name, work in (("first use", write), ("allocated", allocate), ("written", write)):
        started = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        rates[f"files in memory, {name}"] = threads * size / (time.perf_counter() - started)
        for number in range(threads):
            (folder / f"write{number}").unlink()
    del rates["files in memory, first use"]
    return rates


def check(source: Path, target: Path) -> int:
    """Compares every 12th quantised tensor with the CPU path; how many."""
    fp8, bf16 = HFCheckpoint(source), HFCheckpoint(target)
    names = [name for name in sorted(bf16.tensors) if fp8.is_quantised(name)][::12]
    for name in names:
        wanted = dequantise(fp8.stored(name), fp8.scale(name), fp8.block)
        assert torch.equal(bf16.stored(name), wanted), f"{name} differs from the CPU path"
    return len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=7.0)
    parser.add_argument("--folder", default="/dev/shm", help="a file system in memory")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    folder = Path(tempfile.mkdtemp(prefix="vime-cast-", dir=args.folder))
    try:
        # Shards for all threads: two cannot add pages to one file at a time.
        generate(folder / "fp8", args.gigabytes, shard_bytes=350 * 10**6)
        times = []
        for number in range(args.runs):
            shutil.rmtree(folder / "bf16", ignore_errors=True)
            torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            written = cast_to_bf16(folder / "fp8", folder / "bf16", threads=args.threads, device="cuda")
            times.append(time.perf_counter() - started)
            print(f"run {number}: {times[-1]:.3f} s, {written / times[-1] / 1e9:.1f} GB/s written", flush=True)
        gpu_bytes = torch.cuda.max_memory_reserved()
        print(f"bit-equal to the CPU path: {check(folder / 'fp8', folder / 'bf16')} tensors")
        rates = copy_rates()
        rates |= file_rates(folder, args.threads or 16)
    finally:
        shutil.rmtree(folder)
    pcie = min(rates["host to device"], rates["device to host"])
    speed = written / statistics.median(times)
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.1f} GB/s, {rate / pcie:.3f} of PCIe; the cast {speed / rate:.3f} of it")
    ratio = speed / pcie
    print(
        f"cast {ratio:.3f} of the slower direction (floor {FLOOR}), {gpu_bytes / 2**30:.2f} GiB of GPU memory (most 4)"
    )
    return 0 if ratio >= FLOOR and gpu_bytes <= MOST_GPU_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
