"""The stage gate's check of a checkpoint of DeepSeek-R1's size: at most a second, at most a thousandth of the bytes.

    python tools/bench/gate.py --folder /scratch/bench

163 sparse files of 4.3 GB with headers of 560 tensors. The files' pages are dropped from memory before every check.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from vime.launch import gate
from vime.run.plan import Artefact, Stage

SHARDS, SHARD_BYTES, TENSORS = 163, 4_300_000_000, 560
MAX_SECONDS, MAX_SHARE = 1.0, 0.001


def write_shards(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        entries = {
            f"model.layers.{number}.mlp.experts.{i}.down_proj.weight": {
                "dtype": "F8_E4M3", "shape": [7168, 1024], "data_offsets": [i * 7 * 2**20, (i + 1) * 7 * 2**20],
            }
            for i in range(TENSORS)
        }  # fmt: skip
        header = json.dumps(entries).encode()
        with (folder / f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors").open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(SHARD_BYTES)


def drop_pages(folder: Path) -> None:
    """From the page cache; needs the files on the disk."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def bytes_read() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise RuntimeError("this kernel does not say rchar")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; what is made there is removed")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    root = arguments.folder / "gate"
    shutil.rmtree(root, ignore_errors=True)
    try:
        write_shards(root / "fp8")
        (root / "in").mkdir()
        stage = Stage(
            name="cast", nodes=(0,), command=("-c", "pass"), deadline_s=1.0,
            inputs=(Artefact(name="in", path=str(root / "in"), kind="hf"),),
            outputs=(Artefact(name="out", path=str(root / "fp8"), kind="hf"),),
        )  # fmt: skip
        gate.prepare(stage, "/run")
        gate.seal(stage, "/run")
        seconds, read = [], 0
        for _ in range(arguments.repeats):
            drop_pages(root / "fp8")
            before, started = bytes_read(), time.perf_counter()
            why = gate.difference(stage, "/run")
            seconds.append(time.perf_counter() - started)
            read = bytes_read() - before
            if why is not None:
                raise RuntimeError(why)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    share = read / (SHARDS * SHARD_BYTES)
    print(f"check of {SHARDS} shards: {', '.join(f'{s:.2f}' for s in seconds)} s, {read / 1e6:.1f} MB read")
    print(f"median {statistics.median(seconds):.2f} s (at most {MAX_SECONDS:.0f})")
    print(f"share of the bytes that is read: {share:.6%} (at most {MAX_SHARE:.1%})")
    return 0 if statistics.median(seconds) <= MAX_SECONDS and share <= MAX_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
