"""The cast from block fp8 to bf16 against its limit and its peer, in one run, on a generated checkpoint.

    python tools/bench/cast.py --folder /scratch/bench [--gigabytes 4] [--threads 1]

The checkpoint has DeepSeek-V3's expert shapes. All outputs are brought to the disk (fsync) inside the time.
- limit: plain file input and output of the same bytes: read the fp8 files, write as many bytes as the output has
- peer: torch's own upcast and multiply, a tensor at a time, written the same way
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vime.checkpoint import fp8
from vime.checkpoint.cast import cast_to_bf16
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.hf_writer import HFWriter
from vime.checkpoint.safetensors_file import Spec

HIDDEN, FFN = 7168, 2048
SHARD = 10**9
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": 18432,
    "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 128, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe_intermediate_size": FFN, "n_routed_experts": 256, "num_experts_per_tok": 8, "vocab_size": 1024,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def generate(folder: Path, gigabytes: float) -> None:
    """Experts' matrices of random codes, about `gigabytes` in fp8."""
    count = max(1, round(gigabytes * 1e9 / (HIDDEN * FFN)))
    parts = ("gate", "up", "down")
    names = [f"model.layers.0.mlp.experts.{i // 3}.{parts[i % 3]}_proj.weight" for i in range(count)]
    specs: list[Spec] = []
    for name in names:
        shape = (HIDDEN, FFN) if ".down_proj" in name else (FFN, HIDDEN)
        specs.append(Spec(name, torch.float8_e4m3fn, shape))
        specs.append(Spec(fp8.scale_name(name), torch.float32, fp8.scale_shape(shape, (128, 128))))
    writer = HFWriter(folder, specs, max_shard_bytes=SHARD)
    writer.create()
    codes = torch.randint(0, 0x7F, (HIDDEN * FFN,), dtype=torch.uint8)
    for spec in specs:
        if spec.dtype == torch.float8_e4m3fn:
            writer.write(spec.name, codes.view(torch.float8_e4m3fn).view(spec.shape))
        else:
            writer.write(spec.name, torch.rand(spec.shape) * 1e-3)
    writer.publish(config=CONFIG)


def plain_io(source: Path, target: Path, out_bytes: int) -> None:
    """Read every byte of the source and write as many as the output has, in pieces that stay in the cache."""
    target.mkdir()
    piece = bytearray(1 << 20)
    for file in source.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(piece):
                pass
    with (target / "out").open("wb", buffering=0) as stream:
        left = out_bytes
        while left > 0:
            left -= stream.write(memoryview(piece)[: min(left, len(piece))])
        os.fsync(stream.fileno())


def plain_cast(source: Path, target: Path) -> None:
    """The peer: upcast and multiply with torch, whole tensors."""
    checkpoint = HFCheckpoint(source)
    names = [name for name in checkpoint.tensors if checkpoint.is_quantised(name)]
    specs = [Spec(name, torch.bfloat16, checkpoint.info(name).shape) for name in names]
    writer = HFWriter(target, specs, max_shard_bytes=2 * SHARD)
    writer.create()
    for name in names:
        scale = checkpoint.scale(name).repeat_interleave(128, 0).repeat_interleave(128, 1)
        writer.write(name, (checkpoint.stored(name).to(torch.float32) * scale).to(torch.bfloat16))
    writer.publish()


def timed(target: Path, once: Callable[[], object], repeats: int) -> float:
    """The shortest of some runs, each into a folder that does not exist yet, in seconds."""
    times = []
    for _ in range(repeats):
        shutil.rmtree(target, ignore_errors=True)
        os.sync()
        started = time.perf_counter()
        once()
        times.append(time.perf_counter() - started)
    return min(times)


def equal(left: Path, right: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    a, b = HFCheckpoint(left), HFCheckpoint(right)
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(a.stored(name).view(torch.int16), b.stored(name).view(torch.int16)) for name in a.tensors
    )


class PeakMemory:
    """Samples this process's anonymous memory (not the mapped files, which the kernel can drop) while it is open."""

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._first = self._peak = anonymous_memory()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self._peak = max(self._peak, anonymous_memory())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self._peak - self._first


def anonymous_memory() -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not say RssAnon")


def measure(folder: Path, threads: int, repeats: int) -> Iterator[str]:
    source, out = folder / "fp8", folder / "bf16"
    in_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    largest = max(info.end - info.begin for info in HFCheckpoint(source).tensors.values())
    fp8.dequantise(torch.zeros(1, 1).to(torch.float8_e4m3fn), torch.ones(1, 1))
    with PeakMemory() as memory:
        cast = timed(out, lambda: cast_to_bf16(source, out, threads=threads), repeats)
    out_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    limit = timed(folder / "plain", lambda: plain_io(source, folder / "plain", out_bytes), repeats)
    shutil.rmtree(folder / "plain")
    torch.set_num_threads(threads)
    peer = timed(folder / "peer", lambda: plain_cast(source, folder / "peer"), 1)
    moved = (in_bytes + out_bytes) / 1e9
    yield f"{in_bytes / 1e9:.2f} GB of fp8 to {out_bytes / 1e9:.2f} GB, {threads} threads"
    yield f"cast {cast:.2f} s, {moved / cast:.2f} GB/s"
    yield f"limit, plain I/O of the same bytes: {limit:.2f} s; the cast has {limit / cast:.0%} of its bandwidth"
    yield f"peer, upcast and multiply: {peer:.2f} s; the cast is {peer / cast:.1f} x as fast"
    yield f"bit-equal with the peer: {equal(out, folder / 'peer')}"
    yield f"memory of its own grew by {memory.grown / 2**20:.0f} MiB; the largest tensor has {largest / 2**20:.0f} MiB"


def compute(repeats: int) -> Iterator[str]:
    """The kernel alone, in memory, on one core."""
    torch.set_num_threads(1)
    q = torch.randint(0, 0x7F, (2048, 7168), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale, out = torch.rand(16, 56), torch.empty(2048, 7168, dtype=torch.bfloat16)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return q.numel() / min(times) / 1e9

    wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    ours = best(lambda: fp8.dequantise(q, scale, out=out))
    plain = best(lambda: out.copy_(q.to(torch.float32) * wide))
    from_, to = torch.ones(q.numel() * 3 // 2, dtype=torch.uint8), torch.empty(q.numel() * 3 // 2, dtype=torch.uint8)
    copy = best(lambda: to.copy_(from_))
    yield (
        f"in memory, one core: {ours:.2f} Gparam/s, upcast and multiply {plain:.3f} ({ours / plain:.1f} x), "
        f"copy of the same bytes {copy:.2f} ({ours / copy:.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; about five times the checkpoint's size")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the lines here too")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not (arguments.folder / "fp8").exists():
        generate(arguments.folder / "fp8", arguments.gigabytes)
    said = []
    for line in [*measure(arguments.folder, arguments.threads, arguments.repeats), *compute(arguments.repeats)]:
        print(line, flush=True)
        said.append(line)
    if arguments.json:
        arguments.json.write_text(json.dumps(said, indent=2) + "\n")


if __name__ == "__main__":
    main()
