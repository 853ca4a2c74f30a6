"""Casts an HF folder from block fp8 to bf16, by any number of ranks that share a file system.

Each shard file is cast by one rank and published by rename once its bytes are on disk, so that a second run resumes
an interrupted one. Rank 0 waits for all shards, adds index, config and small files, and renames the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vime.checkpoint.hf import INDEX, SINGLE, HFCheckpoint
from vime.checkpoint.hf_writer import copy_small_files, require_empty
from vime.checkpoint.progress import Progress
from vime.checkpoint.ranks import rank_and_size
from vime.checkpoint.safetensors_file import Spec, TensorInfo, layout, raw_bytes, same_bytes
from vime.errors import BadInput, DeadlineExceeded, VimeError
from vime.fp8.quantise import SCALE_SUFFIX, dequantise, scale_name
from vime.models.config import NotTrained
from vime.models.families import params_of
from vime.models.namemap import Param
from vime.system.files import (
    READABLE,
    draft,
    publish_folder,
    read_json,
    remove_drafts,
    require_space,
    write_at,
    write_json,
)

if TYPE_CHECKING:
    from vime.checkpoint.cast_gpu import GpuCaster

STAMP = "vime_cast.json"
# Output bytes per piece of work; each thread reuses a buffer of this size.
PIECE_BYTES = 4 * 2**20
STALL_SECONDS = 1800.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Shard:
    """One output file: its header, its tensors' places, and its size in bytes."""

    name: str
    header: bytes
    places: dict[str, TensorInfo]

    @property
    def bytes(self) -> int:
        return max((info.end for info in self.places.values()), default=len(self.header))


def cast_to_bf16(
    source: str | Path,
    target: str | Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    threads: int | None = None,
    device: str | None = None,
    stall_s: float = STALL_SECONDS,
) -> int:
    """Cast this rank's share of a block-fp8 checkpoint, of any model; rank 0 returns once the whole is published.

    Unquantised tensors pass through unchanged. Tensors of a model that vime trains are compared with its table.
    `device` is `cpu` or a GPU's name; by default a GPU if present. Returns the bytes that this rank wrote. Raises
    BadInput for a source that is incomplete or not fp8, a target with other content, or a disk that is too small;
    DeadlineExceeded if no rank finishes a shard for `stall_s` seconds.
    """
    check_rank(rank, world_size)
    source, target = Path(source), Path(target)
    checkpoint = HFCheckpoint(source)
    shards = output_shards(checkpoint)
    stamp = {"tool": "fp8_cast_bf16", **checkpoint.fingerprint()}
    if _is_done(target, stamp, shards):
        return 0
    partial = target.with_name(f".{target.name}.partial")
    if rank == 0:
        _prepare(partial, target, stamp, shards)
    else:
        ready = lambda: read_json(partial / STAMP) == stamp or _is_done(target, stamp, shards)  # noqa: E731
        _wait(lambda: [] if ready() else [f"{partial}/{STAMP}"], stall_s)
    missing = _missing(partial, shards)
    mine = [shard for shard in shards[rank::world_size] if shard.name in missing]
    if _is_done(target, stamp, shards):
        return 0
    total = sum(shard.bytes for shard in mine)
    progress = Progress(f"cast, rank {rank} of {world_size}:", total)
    caster, threads = _caster(checkpoint, device), threads or len(os.sched_getaffinity(0))
    at_once = max(1, min(caster.shards_at_once or threads, len(mine)))
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(at_once) as files:
        pieces = Window(pool, max(1, 2 * threads // at_once))
        for _ in files.map(lambda shard: _write_shard(caster, shard, partial, pieces, progress), mine):
            pass
    caster.close()
    progress.close()
    checkpoint.close()
    if rank == 0:
        _wait(lambda: _missing(partial, shards), stall_s)
        _publish(checkpoint, shards, partial, target)
    return total


def verify_cast(
    source: str | Path, target: str | Path, *, rank: int = 0, world_size: int = 1, threads: int | None = None
) -> None:
    """Read this rank's share of both folders, all bytes, and compare the target with a cast of the source.

    Raises BadInput with file and tensor for the first difference.
    """
    check_rank(rank, world_size)
    checkpoint, made = HFCheckpoint(source), HFCheckpoint(target)
    shards = output_shards(checkpoint)
    mine = shards[rank::world_size]
    progress = Progress(f"verify, rank {rank} of {world_size}:", sum(shard.bytes for shard in mine))
    caster = CpuCaster(checkpoint)

    def piece(work: tuple[TensorInfo, int, int]) -> None:
        info, first, last = work
        rows, found = _cast_rows(caster, *work), made.stored(info.name)
        if not same_bytes(rows, found[first:last] if info.shape else found):
            raise BadInput(
                f"{made.info(info.name).file}: {info.name} is not what the cast makes of "
                f"{checkpoint.info(info.name).file}: verify the source (python -m vime.fetch --check), then cast again"
            )
        progress.add(rows.nbytes)

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        for shard in mine:
            for info in shard.places.values():
                found = made.info(info.name)
                if (found.file.name, found.dtype, found.shape) != (info.file.name, info.dtype, info.shape):
                    raise BadInput(
                        f"{found.file}: {info.name} differs in file, type or shape from what the cast writes"
                    )
            progress.add(len(shard.header))
            list(pool.map(piece, (work for info in shard.places.values() for work in _pieces(caster, info))))
    progress.close()


def check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise BadInput(f"rank {rank} of {world_size}: give a rank from 0 to {world_size - 1}")


def output_shards(checkpoint: HFCheckpoint) -> list[Shard]:
    """Output files: those of the source, without scales, with fp8 tensors as bf16. Checks every tensor."""
    fp8 = {name for name in checkpoint.tensors if checkpoint.is_quantised(name)}
    if not fp8:
        raise BadInput(f"{checkpoint.path} holds no fp8 tensors: it needs no cast")
    for name in fp8:
        checkpoint.scale(name)
    scales = {scale_name(name) for name in fp8}
    files: dict[str, list[Spec]] = {}
    for name, info in checkpoint.tensors.items():
        specs = files.setdefault(info.file.name, [])
        if name in scales:
            continue
        if name.endswith(SCALE_SUFFIX):
            raise BadInput(f"{info.file}: {name} is a scale, but its weight is not stored in fp8: fetch it again")
        specs.append(Spec(name, torch.bfloat16 if name in fp8 else info.dtype, info.shape))
    if (params := _known_params(checkpoint)) is not None:
        checkpoint.check(params)
    return [Shard(file, *layout(Path(file), specs)) for file, specs in sorted(files.items()) if specs]


def _known_params(checkpoint: HFCheckpoint) -> tuple[Param, ...] | None:
    """Parameters that the folder has to hold; None for a model that vime does not train, whose table nobody has."""
    try:
        return params_of(checkpoint.config)
    except NotTrained:
        return None


def _is_done(target: Path, stamp: dict[str, Any], shards: Sequence[Shard]) -> bool:
    """True if the target is a complete output of this very cast."""
    return read_json(target / STAMP) == stamp and not _missing(target, shards)


def _missing(folder: Path, shards: Sequence[Shard]) -> list[str]:
    """Output files that are missing or incomplete."""
    return [shard.name for shard in shards if _size(folder / shard.name) != shard.bytes]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _prepare(partial: Path, target: Path, stamp: dict[str, Any], shards: list[Shard]) -> None:
    """Make a partial folder for this very cast: the interrupted one's, or a new one."""
    require_empty(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if partial.exists() and read_json(partial / STAMP) != stamp:
        shutil.rmtree(partial)
    missing = _missing(partial, shards)
    require_space(target.parent, sum(shard.bytes for shard in shards if shard.name in missing))
    partial.mkdir(exist_ok=True)
    write_json(partial / STAMP, stamp, mode=READABLE)


def _caster(checkpoint: HFCheckpoint, device: str | None) -> CpuCaster | GpuCaster:
    if device is None:
        square = checkpoint.block[0] == checkpoint.block[1]
        device = "cuda" if torch.cuda.is_available() and square else "cpu"
    if device == "cpu":
        return CpuCaster(checkpoint)
    from vime.checkpoint.cast_gpu import GpuCaster

    return GpuCaster(checkpoint, torch.device(device))


@dataclass(frozen=True)
class Window:
    """Thread pool that works on a few pieces of each shard at a time, so that shards take turns."""

    pool: ThreadPoolExecutor
    size: int

    def run(self, call: Callable[[Any], None], items: Iterator[Any]) -> None:
        """Call with every item; stops at the first error."""
        pending: deque[Future[None]] = deque()
        for item in items:
            if len(pending) == self.size:
                pending.popleft().result()
            pending.append(self.pool.submit(call, item))
        for future in pending:
            future.result()


class CpuCaster:
    """Dequantises rows of mapped files into a buffer that each thread keeps.

    Allocating one for every piece would leave all threads' heaps large.
    """

    piece_bytes = PIECE_BYTES
    shards_at_once = 1

    def __init__(self, checkpoint: HFCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._kept = threading.local()

    def rows(self, info: TensorInfo, first: int, last: int, scales: torch.Tensor) -> torch.Tensor:
        """bf16 [last - first, columns], valid until this thread's next call; `scales` are those of the rows' blocks."""
        stored = self.checkpoint.stored(info.name)[first:last]
        buffer = getattr(self._kept, "buffer", None)
        if buffer is None or buffer.numel() < stored.numel():
            self._kept.buffer = buffer = torch.empty(stored.numel(), dtype=torch.bfloat16)
        return dequantise(stored, scales, self.checkpoint.block, out=buffer[: stored.numel()].view(stored.shape))

    def close(self) -> None:
        """Nothing to release."""


def _write_shard(
    caster: CpuCaster | GpuCaster, shard: Shard, partial: Path, pieces: Window, progress: Progress
) -> None:
    remove_drafts(partial / shard.name)
    with draft(partial / shard.name, mode=READABLE) as file:
        os.ftruncate(file, shard.bytes)
        write_at(file, memoryview(shard.header), 0)
        progress.add(len(shard.header))

        def piece(work: tuple[TensorInfo, int, int]) -> None:
            progress.add(_write_rows(caster, file, *work))

        pieces.run(piece, (work for info in shard.places.values() for work in _pieces(caster, info)))


def _pieces(caster: CpuCaster | GpuCaster, info: TensorInfo) -> Iterator[tuple[TensorInfo, int, int]]:
    """Row ranges of a tensor (whole block rows) of about the caster's piece size; (0, 1) is all of a scalar."""
    rows, checkpoint = info.shape[0] if info.shape else 1, caster.checkpoint
    block = checkpoint.block[0] if checkpoint.is_quantised(info.name) else 1
    row_bytes = max(1, (info.end - info.begin) // max(1, rows))
    step = max(1, caster.piece_bytes // row_bytes // block) * block
    for first in range(0, rows, step):
        yield info, first, min(first + step, rows)


def _write_rows(caster: CpuCaster | GpuCaster, file: int, info: TensorInfo, first: int, last: int) -> int:
    """Cast or copy rows of a tensor into their place; returns the bytes written."""
    offset = info.begin + first * ((info.end - info.begin) // max(1, info.shape[0] if info.shape else 1))
    return write_at(file, raw_bytes(_cast_rows(caster, info, first, last)), offset)


def _cast_rows(caster: CpuCaster | GpuCaster, info: TensorInfo, first: int, last: int) -> torch.Tensor:
    """Rows of a tensor as the output stores them, valid until this thread's next call."""
    checkpoint = caster.checkpoint
    if checkpoint.is_quantised(info.name):
        block = checkpoint.block[0]
        scales = checkpoint.finite(info.name, checkpoint.scale(info.name)[first // block : -(-last // block)])
        return caster.rows(checkpoint.info(info.name), first, last, scales)
    stored = checkpoint.stored(info.name)
    return stored[first:last] if info.shape else stored


def _wait(missing: Callable[[], list[str]], stall_s: float) -> None:
    """Wait until nothing is missing; the deadline is extended whenever the list gets shorter."""
    left, deadline = missing(), time.monotonic() + stall_s
    while left:
        if time.monotonic() > deadline:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise DeadlineExceeded(f"for {stall_s:.0f} s no other rank finished {', '.join(left[:3])}{more}")
        time.sleep(_POLL_SECONDS)
        now = missing()
        if len(now) < len(left):
            deadline = time.monotonic() + stall_s
        left = now


def _publish(checkpoint: HFCheckpoint, shards: list[Shard], partial: Path, target: Path) -> None:
    copy_small_files(checkpoint.path, partial)
    config = json.loads((checkpoint.path / "config.json").read_text())
    config.pop("quantization_config")
    write_json(partial / "config.json", config, mode=READABLE)
    if [shard.name for shard in shards] != [SINGLE]:
        weight_map = {name: shard.name for shard in shards for name in shard.places}
        total = sum(info.end - info.begin for shard in shards for info in shard.places.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(partial / INDEX, index, mode=READABLE)
    for leftover in partial.glob(".*"):
        leftover.unlink()
    if target.exists():
        target.rmdir()
    publish_folder(partial, target)


def place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks: as given, else from torchrun's or Slurm's environment, else 0 of 1."""
    if (rank is None) != (world_size is None):
        raise BadInput("--rank and --world-size belong together: give both or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    return rank_and_size(os.environ)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: cast this process's share; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Cast a block-fp8 HF checkpoint to bf16. Started by srun or torchrun, processes share the work."
    )
    parser.add_argument("--input-fp8-hf-path", required=True)
    parser.add_argument("--output-bf16-hf-path", required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--threads", type=int, help="threads of this process (default: the cores it may use)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    parser.add_argument("--verify", action="store_true", help="compare all bytes of an output with what a cast makes")
    parser.add_argument("--stall-timeout", type=float, default=STALL_SECONDS, help="seconds to wait for other ranks")
    arguments = parser.parse_args(argv)
    try:
        source, target = arguments.input_fp8_hf_path, arguments.output_bf16_hf_path
        rank, world_size = place(arguments.rank, arguments.world_size)
        share = {"rank": rank, "world_size": world_size, "threads": arguments.threads}
        if arguments.verify:
            verify_cast(source, target, **share)
        else:
            cast_to_bf16(source, target, **share, device=arguments.device, stall_s=arguments.stall_timeout)
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return int(BadInput.cause)
    return 0


if __name__ == "__main__":
    sys.exit(main())
