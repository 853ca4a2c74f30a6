"""Profiling of a rank: torch's profiler, markers for Nsight Systems, memory at an out-of-memory error.

<run>/profiles/rollout-0003.rank-008.json.gz    trace of torch's profiler, for Perfetto or chrome://tracing
<run>/profiles/rank-008.<process>.nsys-rep      report of Nsight Systems; of several rollouts .1.nsys-rep, …
<run>/profiles/out-of-memory.rank-008.pickle    CUDA memory snapshot, for https://pytorch.org/memory_viz
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vime.run.plan import Plan
from vime.run.profiles import profile_folder, profiles
from vime.system.private import private_folder

HISTORY_ENTRIES = 100_000
"""Allocations that the memory history holds, about 100 MB."""


class Profiler:
    """Profiles the training of chosen rollouts on chosen ranks; does nothing on others."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._plan, self._rank = plan, rank
        if plan.recipe.profile.record_memory_history and torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=HISTORY_ENTRIES)  # pyright: ignore[reportPrivateUsage]

    @contextlib.contextmanager
    def during(self, rollout_id: int) -> Iterator[None]:
        """Profile the block if rank and rollout are chosen. The trace is written when the block has ended well."""
        options = self._plan.recipe.profile
        if not profiles(options, self._rank, rollout_id):
            yield
        elif options.profiler == "nsys":
            with self._capture():
                yield
        else:
            with torch.profiler.profile(activities=_activities()) as recorded:
                yield
            path = profile_folder(self._plan.run_dir) / f"rollout-{rollout_id:04d}.rank-{self._rank:03d}.json.gz"
            private_folder(path.parent)
            recorded.export_chrome_trace(str(path))
            path.chmod(0o600)
            print(f"profile of rollout {rollout_id} on rank {self._rank}: {path}", flush=True)

    @contextlib.contextmanager
    def _capture(self) -> Iterator[None]:
        """The range that Nsight Systems records: it waits for CUDA's profiler to start."""
        runtime: Any = torch.cuda.cudart()
        runtime.cudaProfilerStart()
        try:
            yield
        finally:
            torch.cuda.synchronize()
            runtime.cudaProfilerStop()


def _activities() -> list[torch.profiler.ProfilerActivity]:
    cpu = [torch.profiler.ProfilerActivity.CPU]
    return [*cpu, torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else cpu


@contextlib.contextmanager
def memory_snapshot(run_dir: str, rank: int) -> Iterator[None]:
    """Write a snapshot of CUDA's allocations if the block runs out of GPU memory; the error goes on."""
    try:
        yield
    except torch.OutOfMemoryError:
        path = private_folder(profile_folder(run_dir)) / f"out-of-memory.rank-{rank:03d}.pickle"
        try:
            write_snapshot(path)
        except (OSError, RuntimeError) as error:
            print(f"note: no memory snapshot was written: {error}", flush=True)
        else:
            print(f"memory snapshot of rank {rank}: {path} (docs/profiling.md)", flush=True)
        raise


def write_snapshot(path: Path) -> None:
    """Write the snapshot, readable by its owner alone."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    torch.cuda.memory._dump_snapshot(str(path))  # pyright: ignore[reportPrivateUsage]
