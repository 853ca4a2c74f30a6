"""The cast tool on one GPU, from and to files in memory, against the slower direction of PCIe.

    python tools/bench/gpu/cast.py [--experts 160] [--folder /dev/shm]

Generates a block-fp8 checkpoint with DeepSeek-V3's expert shapes, casts it on the GPU, compares tensors with the CPU
path, and measures pinned copies in both directions in the same run. Prints its ratios last and exits 1 where one falls
short: at least 0.8 of the slower direction, at most 4 GiB of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from vime.checkpoint.cast import cast_to_bf16
from vime.checkpoint.fp8 import dequantise, scale_name
from vime.checkpoint.fp8_triton import quantise_many
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.safetensors_file import Spec, layout, raw_bytes
from vime.recipe import files

FLOOR, MOST_GPU_BYTES = 0.8, 4 * 2**30
SHAPES = {"gate_proj": (2048, 7168), "up_proj": (2048, 7168), "down_proj": (7168, 2048)}
EXPERTS_A_SHARD = 8


def generate(folder: Path, experts: int) -> None:
    """Shards of routed experts, quantised on the GPU from random weights."""
    folder.mkdir()
    weight_map, shards = {}, -(-experts // EXPERTS_A_SHARD)
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {}
        for expert in range(shard * EXPERTS_A_SHARD, min(experts, (shard + 1) * EXPERTS_A_SHARD)):
            names = [f"model.layers.3.mlp.experts.{expert}.{part}.weight" for part in SHAPES]
            weights = [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in SHAPES.values()]
            for tensor, q, s in zip(names, *quantise_many(weights), strict=True):
                tensors |= {tensor: q.cpu(), scale_name(tensor): s.cpu()}
        header, places = layout(folder / name, [Spec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()])
        with (folder / name).open("wb") as file:
            file.write(header)
            for tensor in places:
                file.write(raw_bytes(tensors[tensor]))
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = files.read(files.find("models", "deepseek-r1"))
    (folder / "config.json").write_text(json.dumps(config))


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


def file_rate(folder: Path, threads: int, size: int = 2**28) -> float:
    """Bytes a second that as many threads write to files there at the same time: the limit that PCIe may hide."""
    from concurrent.futures import ThreadPoolExecutor

    data = raw_bytes(torch.randint(0, 255, (2**25,), dtype=torch.uint8))

    def write(number: int) -> None:
        with (folder / f"write{number}").open("wb", buffering=0) as file:
            for _ in range(size // len(data)):
                file.write(data)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(threads)))
    seconds = time.perf_counter() - started
    for number in range(threads):
        (folder / f"write{number}").unlink()
    return threads * size / seconds


def check(source: Path, target: Path) -> int:
    """Compares the first tensors of every shard with the CPU path; how many."""
    fp8, bf16 = HFCheckpoint(source), HFCheckpoint(target)
    names = [name for name in bf16.tensors if int(name.split(".")[5]) % EXPERTS_A_SHARD == 0]
    for name in names:
        wanted = dequantise(fp8.stored(name), fp8.scale(name), fp8.block)
        assert torch.equal(bf16.stored(name), wanted), f"{name} differs from the CPU path"
    return len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=160, help="44 M parameters each")
    parser.add_argument("--folder", default="/dev/shm", help="a file system in memory")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    folder = Path(tempfile.mkdtemp(prefix="vime-cast-", dir=args.folder))
    try:
        generate(folder / "fp8", args.experts)
        torch.cuda.empty_cache()
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
        rates["files in memory, all threads"] = file_rate(folder, args.threads or 16)
    finally:
        shutil.rmtree(folder)
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.1f} GB/s")
    limit = written / statistics.median(times) / rates["files in memory, all threads"]
    print(f"cast {limit:.3f} of what as many threads write into files in memory, one each")
    ratio = written / statistics.median(times) / min(rates["host to device"], rates["device to host"])
    print(
        f"cast {ratio:.3f} of the slower direction (floor {FLOOR}), {gpu_bytes / 2**30:.2f} GiB of GPU memory (most 4)"
    )
    return 0 if ratio >= FLOOR and gpu_bytes <= MOST_GPU_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
