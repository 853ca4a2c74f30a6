"""What Slurm says about its partitions, for submissions without a cluster profile and for checks before them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from vime.slurm.queue import SlurmError, parse_limit


@dataclass(frozen=True)
class Partition:
    """One partition as `sinfo` reports it; sizes are the least of its nodes."""

    name: str
    default: bool
    up: bool
    nodes: int
    cpus: int
    memory_bytes: int
    gpus: int
    time_limit_minutes: int | None


def has_slurm() -> bool:
    """Whether jobs can be submitted from here."""
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def query_partitions(timeout_s: float = 20.0) -> list[Partition]:
    """All partitions. Raises SlurmError where sinfo fails."""
    command = ["sinfo", "--noheader", "--format=%R|%P|%a|%D|%c|%m|%G|%l"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"sinfo gave no answer in {timeout_s:g} s: is Slurm's controller up?") from error
    except OSError as error:
        raise SlurmError(f"cannot run sinfo: {error.strerror}") from error
    if result.returncode:
        raise SlurmError(
            f"sinfo fails ({(result.stderr.strip().splitlines() or ['no output'])[-1]}): is Slurm's controller up?"
        )
    return parse_partitions(result.stdout)


def parse_partitions(text: str) -> list[Partition]:
    """Partitions of sinfo's lines `%R|%P|%a|%D|%c|%m|%G|%l`, of which a partition has one a kind of node."""
    merged: dict[str, Partition] = {}
    for line in text.splitlines():
        name, shown, state, nodes, cpus, memory, gres, limit = line.strip().split("|")
        this = Partition(
            name=name,
            default=shown.endswith("*"),
            up=state.startswith("up"),
            nodes=_number(nodes),
            cpus=_number(cpus),
            memory_bytes=_number(memory) * 2**20,
            gpus=sum(int(count) for count in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", gres)),
            time_limit_minutes=parse_limit(limit),
        )
        merged[name] = _merge(merged[name], this) if name in merged else this
    return list(merged.values())


def _merge(a: Partition, b: Partition) -> Partition:
    return Partition(
        name=a.name,
        default=a.default or b.default,
        up=a.up or b.up,
        nodes=a.nodes + b.nodes,
        cpus=min(a.cpus, b.cpus),
        memory_bytes=min(a.memory_bytes, b.memory_bytes),
        gpus=min(a.gpus, b.gpus),
        time_limit_minutes=a.time_limit_minutes,
    )


def _number(text: str) -> int:
    """sinfo writes `64+` where nodes differ."""
    return int(text.rstrip("+"))
