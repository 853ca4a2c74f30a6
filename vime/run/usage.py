"""Load of a run's nodes and engines, in small files that nodes and the driver replace and vime.top reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vime.system.files import PRIVATE, read_json, write_json
from vime.system.private import private_folder

FOLDER, QUEUES = "usage", "queues.json"
FRESH_SECONDS = 120.0
"""Age in seconds from which a file is stale."""


@dataclass(frozen=True)
class GpuUsage:
    """One GPU at one moment."""

    index: int
    percent: float | None
    """Share of the last sample period with a running kernel; None if the driver gives no value, also below."""
    memory_used: float | None
    """Bytes of GPU memory in use."""
    memory_total: float | None
    celsius: float | None


@dataclass(frozen=True)
class NodeUsage:
    """One node at one moment."""

    node: int
    """Number of the logical node."""
    time: float
    """Unix seconds."""
    load: float
    """Mean number of runnable processes over a minute."""
    cores: int
    memory_used: float
    """Bytes of host memory: total minus available."""
    memory_total: float
    gpus: tuple[GpuUsage, ...] = field(default=())

    @property
    def fresh(self) -> bool:
        return time.time() - self.time < FRESH_SECONDS


def write_usage(run_dir: str | Path, usage: NodeUsage) -> None:
    folder = private_folder(Path(run_dir) / FOLDER)
    write_json(folder / f"node{usage.node:02d}.json", asdict(usage), mode=PRIVATE)


def read_usage(run_dir: str | Path) -> list[NodeUsage]:
    """Newest usage of every node that has written one, ordered by node."""
    found = []
    for path in sorted((Path(run_dir) / FOLDER).glob("node*.json")):
        values = read_json(path)
        if values is not None:
            gpus = tuple(GpuUsage(**gpu) for gpu in values.pop("gpus"))
            found.append(NodeUsage(**values, gpus=gpus))
    return sorted(found, key=lambda usage: usage.node)


def write_queues(run_dir: str | Path, loads: Sequence[Sequence[int]]) -> None:
    """Write the number of running samples on each data-parallel rank of each engine."""
    write_json(Path(run_dir) / QUEUES, {"time": time.time(), "loads": [list(ranks) for ranks in loads]}, mode=PRIVATE)


def read_queues(run_dir: str | Path) -> list[list[int]]:
    """Values from the last `write_queues`; empty if stale or never written."""
    values: dict[str, Any] = read_json(Path(run_dir) / QUEUES) or {}
    return values["loads"] if time.time() - values.get("time", 0.0) < FRESH_SECONDS else []
