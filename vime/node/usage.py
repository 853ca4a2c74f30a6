"""Samples a node's use of processors, memory and GPUs while a service runs on it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from vime.run.usage import GpuUsage, NodeUsage, write_usage

PERIOD_SECONDS = 20.0
_SMI_SECONDS = 15.0
_QUERY = ("index", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")


def parse_gpus(text: str) -> tuple[GpuUsage, ...]:
    """GPUs of `nvidia-smi --query-gpu=… --format=csv,noheader,nounits`: percent, MiB and degrees Celsius."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(_QUERY):
            index, percent, used, total, celsius = (_number(cell) for cell in cells)
            if index is not None:
                found.append(GpuUsage(int(index), percent, _bytes(used), _bytes(total), celsius))
    return tuple(found)


def sample(node: int) -> NodeUsage:
    """Usage of this host now, as that of logical node `node`. Without nvidia-smi there are no GPUs."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(memory[name].split()[0]) * 1024.0 for name in ("MemTotal", "MemAvailable"))
    cores = len(os.sched_getaffinity(0))
    return NodeUsage(node, time.time(), os.getloadavg()[0], cores, total - available, total, _gpus())


class UsageWriter(threading.Thread):
    """Writes a sample every PERIOD_SECONDS for as long as the process lives; a failure to write ends it with a line."""

    def __init__(self, run_dir: str, node: int, period_s: float = PERIOD_SECONDS) -> None:
        super().__init__(daemon=True, name="usage")
        self._run_dir, self._node, self._period_s = run_dir, node, period_s

    def run(self) -> None:
        while True:
            try:
                write_usage(self._run_dir, sample(self._node))
            except OSError as error:
                print(f"note: the use of this node is no longer written: {error}", file=sys.stderr, flush=True)
                return
            time.sleep(self._period_s)


def _gpus() -> tuple[GpuUsage, ...]:
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(done.stdout) if done.returncode == 0 else ()


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _bytes(mebibytes: float | None) -> float | None:
    return None if mebibytes is None else mebibytes * 2**20
