"""Shared parts of the checkpoint benchmarks: a generated checkpoint, plain file I/O, counters of bytes and memory."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from vime.checkpoint.hf_writer import HFWriter
from vime.checkpoint.safetensors_file import Spec
from vime.fp8 import quantise as fp8
from vime.fp8.quantise import is_quantised, scale_name, scale_shape
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.recipe import files

SHARD = 10**9
PIECE = 1 << 20
# Of the 129280 tokens; the two largest matrices, which are bf16, would be most of a small checkpoint.
VOCABULARY = 16384
EXPERT_BYTES = 3 * 7168 * 2048
OTHER_BYTES = 1.24e9


def generate(folder: Path, gigabytes: float, shard_bytes: int = SHARD) -> None:
    """DeepSeek-V3's own shapes in block fp8, at least `gigabytes` large: one dense and one expert layer, fewer experts.

    Numbers are random, but the same in all matrices of a size.
    """
    experts = max(8, 8 * -(-int(gigabytes * 1e9 - OTHER_BYTES) // (8 * EXPERT_BYTES)))
    hf: dict[str, Any] = {
        **files.read(files.find("models", "deepseek-r1")),
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "n_routed_experts": experts,
        "vocab_size": VOCABULARY,
    }
    config = ModelConfig.from_hf(hf)
    specs: list[Spec] = []
    for param in params_of(config):
        for part in param.parts:
            if is_quantised(part.name, part.quantised, config.quantisation):
                specs.append(Spec(part.name, torch.float8_e4m3fn, part.shape))
                specs.append(Spec(scale_name(part.name), torch.float32, scale_shape(part.shape, (128, 128))))
            else:
                specs.append(Spec(part.name, torch.float32 if param.fp32 else torch.bfloat16, part.shape))
    writer = HFWriter(folder, specs, max_shard_bytes=shard_bytes)
    writer.create()
    largest = max(torch.Size(spec.shape).numel() for spec in specs)
    codes = torch.randint(0, 0x7F, (largest,), dtype=torch.uint8).view(torch.float8_e4m3fn)
    for spec in specs:
        if spec.dtype == torch.float8_e4m3fn:
            writer.write(spec.name, codes[: torch.Size(spec.shape).numel()].view(spec.shape))
        else:
            writer.write(spec.name, torch.rand(spec.shape, dtype=torch.float32).mul_(1e-3).to(spec.dtype))
    writer.publish(config=hf)
    # Compiled before anything is timed.
    fp8.dequantise(torch.zeros(1, 1).to(torch.float8_e4m3fn), torch.ones(1, 1))


def weight_bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def drop_pages(folder: Path) -> None:
    """Lets the kernel forget the content of a folder's files, so that they are read from the disk."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def plain_read(source: Path) -> float:
    """Seconds to read the weights of a folder, one file after the other."""
    piece = bytearray(PIECE)
    started = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(piece):
                pass
    return time.perf_counter() - started


def plain_write(target: Path, count: int) -> float:
    """Seconds to write bytes to files of a shard's size, fsync included; the files are removed."""
    piece, started = memoryview(bytearray(os.urandom(PIECE))), time.perf_counter()
    target.mkdir()
    for number in range(-(-count // SHARD)):
        with (target / str(number)).open("wb", buffering=0) as stream:
            left = min(SHARD, count - number * SHARD)
            while left > 0:
                left -= stream.write(piece[: min(left, PIECE)])
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    return seconds


def disk_traffic() -> tuple[int, int]:
    """Bytes that this process caused to be read from and written to disks so far, mapped files among them."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found["read_bytes"]), int(found["write_bytes"])


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
