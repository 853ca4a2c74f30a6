"""Test program: casts or converts in children that die at a chosen byte. Arguments: `TOOL SOURCE FOLDER POINT…`.

Every byte written counts, and every rename, unlink and new folder counts as one more; at its point a child ends as by
SIGKILL, after the bytes before it. Prints a line of JSON per point: the child's exit code, and what is visible after
its death and again after an undisturbed second run.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from vime.checkpoint import cast, dist_save
from vime.checkpoint.convert import TIMEOUT, convert
from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.ranks import Ranks, process_group
from vime.checkpoint.torch_dist import checkpoint_folder
from vime.errors import BadInput
from vime.fp8 import quantise as fp8
from vime.recipe.parallel import ParallelLayout
from vime.run.checkpoints import TRACKER

FILE_BYTES = 200_000
KILLED = 137


class Death:
    """Counts what is done to the disk, and ends the process at its point."""

    def __init__(self, point: int) -> None:
        self.left, self.lock, self.pwrite = point, threading.Lock(), os.pwrite
        os.pwrite = self.write
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, self.counted(getattr(os, name)))

    def write(self, file: int, data, offset: int) -> int:
        with self.lock:
            room, self.left = self.left, self.left - len(data)
            if self.left <= 0:
                self.pwrite(file, memoryview(data)[: max(0, room)], offset)
                os._exit(KILLED)
        return self.pwrite(file, data, offset)

    def counted(self, call):
        def one(*arguments, **options):
            with self.lock:
                self.left -= 1
                if self.left <= 0:
                    os._exit(KILLED)
            return call(*arguments, **options)

        return one


def run(tool: str, source: Path, target: Path) -> None:
    if tool == "cast":
        cast.cast_to_bf16(source, target, threads=2)
    else:
        with process_group(Ranks(), TIMEOUT):
            convert(HFCheckpoint(source), target, ParallelLayout(), 0, threads=2, file_bytes=FILE_BYTES)


def child(tool: str, source: Path, target: Path, point: int | None) -> int:
    """Exit code of a run in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            if point is not None:
                Death(point)
            run(tool, source, target)
        except BaseException as error:  # noqa: BLE001 -- the child must end here, whatever happens
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def looks_complete(tool: str, target: Path) -> bool:
    if tool == "cast":
        return target.exists()
    if (target / TRACKER).exists():
        return True
    try:
        checkpoint_folder(target)
    except BadInput:
        return False
    return True


def finished(tool: str, target: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the files that need not be made again."""
    partial = target.with_name(f".{target.name}.partial") if tool == "cast" else target / dist_save.PARTIAL
    names = partial.glob("model-*" if tool == "cast" else "__*.distcp")
    if tool == "convert":
        names = (path for path in names if (partial / f".{path.name}.json").exists())
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in names}


def main(tool: str, source: Path, folder: Path, points: list[int]) -> None:
    # Compiled once, before the first fork.
    fp8.dequantise(torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(1, 1), (16, 16))
    for point in points:
        target = folder / f"{tool}-{point}"
        code, seen = child(tool, source, target, point), looks_complete(tool, target)
        before = finished(tool, target)
        again = child(tool, source, target, None)
        final = target if tool == "cast" else checkpoint_folder(target)
        after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in final.iterdir()}
        left = [path.name for path in (*folder.iterdir(), *target.iterdir()) if ".partial" in path.name]
        left += [path.name for path in final.iterdir() if path.name.startswith(".") and path.name != ".metadata"]
        kept = {name: after[name] == before[name] for name in before}
        print(json.dumps({"point": point, "code": code, "complete": seen, "again": again, "kept": kept, "left": left}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), [int(word) for word in sys.argv[4:]])
