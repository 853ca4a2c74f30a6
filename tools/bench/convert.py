"""The conversion from block fp8 to torch_dist in one pass against plain file I/O of the same bytes, in one run.

    python tools/bench/convert.py --folder /scratch/bench [--gigabytes 4.1] [--threads 2]

On a generated checkpoint of DeepSeek-V3's shapes. Every round reads the source's files plainly, writes as many bytes
as the output has plainly, and converts, each from the disk and to the disk (fsync). One process, so that its share is
all of the model; what it may hold of it is therefore compared with one tensor a thread, which is stricter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from checkpoint_io import PeakMemory, disk_traffic, drop_pages, generate, plain_read, plain_write, weight_bytes

from vime.checkpoint.convert import TIMEOUT, convert, deal_out, stored_types
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.ranks import Ranks, process_group
from vime.models.families import params_of
from vime.recipe.parallel import ParallelLayout

MAX_WALL, MAX_TRAFFIC, MAX_TENSORS = 1.25, 1.02, 1.5


def largest_box(source: Path) -> int:
    """Bytes of the largest tensor that is written."""
    checkpoint = HFCheckpoint(source)
    types = stored_types(checkpoint, params_of(checkpoint.config))
    sizes = []
    for work in deal_out(checkpoint.config, ParallelLayout()):
        count = types[work.place.key].itemsize
        for size in work.size:
            count *= size
        sizes.append(count)
    return max(sizes)


def one_conversion(source: Path, target: Path, threads: int) -> tuple[float, int, int]:
    """Seconds, bytes of disk traffic, and growth of anonymous memory."""
    drop_pages(source)
    before = sum(disk_traffic())
    with process_group(Ranks(), TIMEOUT), PeakMemory() as memory:
        started = time.perf_counter()
        convert(HFCheckpoint(source), target, ParallelLayout(), 0, threads=threads)
        seconds = time.perf_counter() - started
    return seconds, sum(disk_traffic()) - before, memory.grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="scratch; what is made there is removed")
    parser.add_argument("--gigabytes", type=float, default=4.1, help="of the fp8 checkpoint, at least")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the generated checkpoint for another run")
    arguments = parser.parse_args()
    source, target = arguments.folder / "fp8", arguments.folder / "torch_dist"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        if not source.exists():
            generate(source, arguments.gigabytes)
        ratios, traffic, grown, out_bytes = [], 0.0, 0, 0
        in_bytes = weight_bytes(source, "*.safetensors")
        for _ in range(arguments.rounds):
            shutil.rmtree(target, ignore_errors=True)
            ours, moved, grown = one_conversion(source, target, arguments.threads)
            out_bytes = weight_bytes(target / "release", "*.distcp")
            shutil.rmtree(target)
            drop_pages(source)
            read = plain_read(source)
            write = plain_write(arguments.folder / "plain", out_bytes)
            ratios.append(ours / max(read, write))
            traffic = moved / (in_bytes + out_bytes)
            print(f"converted in {ours:.1f} s; plainly read in {read:.1f} s, written in {write:.1f} s")
        tensor = largest_box(source)
    finally:
        shutil.rmtree(target, ignore_errors=True)
        if not arguments.keep:
            shutil.rmtree(source, ignore_errors=True)
    wall, tensors = statistics.median(ratios), grown / (tensor * arguments.threads)
    print(f"{arguments.threads} threads, {in_bytes / 1e9:.2f} GB of fp8, {out_bytes / 1e9:.2f} GB of torch_dist")
    print(f"traffic / (in + out): {traffic:.3f} (at most {MAX_TRAFFIC})")
    print(f"anonymous memory / (largest tensor x threads): {tensors:.2f} (at most {MAX_TENSORS})")
    print(f"wall / larger of plain reading and writing: {wall:.2f} (at most {MAX_WALL})")
    return 0 if wall <= MAX_WALL and traffic <= MAX_TRAFFIC and tensors <= MAX_TENSORS else 1


if __name__ == "__main__":
    sys.exit(main())
