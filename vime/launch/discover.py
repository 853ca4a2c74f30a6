"""What Slurm says about its partitions, for submissions without a cluster profile and for checks before them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from vime.errors import BadInput
from vime.launch.slurm import parse_limit
from vime.planning.types import Cluster


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
    """All partitions. Raises BadInput where sinfo fails."""
    command = ["sinfo", "--noheader", "--format=%R|%P|%a|%D|%c|%m|%G|%l"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"sinfo gave no answer in {timeout_s:g} s: is Slurm's controller up?") from error
    except OSError as error:
        raise BadInput(f"cannot run sinfo: {error.strerror}") from error
    if result.returncode:
        raise BadInput(
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


def resolve(cluster: Cluster, nodes: int, partitions: list[Partition], *, needs_gpus: int) -> tuple[Cluster, list[str]]:
    """The cluster with what its profile leaves open taken from a partition, and what was chosen, as notes.

    Without a partition in the profile it is the default one when that fits, else the one with the most nodes that does.
    Raises BadInput for a partition that does not exist or has too few nodes.
    """
    partition = _choose(cluster, nodes, partitions, needs_gpus)
    if nodes > partition.nodes:
        raise BadInput(
            f"--nodes: the run needs {nodes} nodes, but partition {partition.name} has {partition.nodes}: "
            "give fewer nodes or another partition"
        )
    update: dict[str, object] = {"partition": partition.name}
    if cluster.cpus_per_node is None:
        update["cpus_per_node"] = partition.cpus
    if cluster.memory_per_node_bytes is None and partition.memory_bytes:
        update["memory_per_node_bytes"] = partition.memory_bytes
    if not cluster.gpus_per_node and cluster.gpu_request != "none":
        if partition.gpus < needs_gpus:
            raise BadInput(
                f"sinfo shows {partition.gpus} GPUs a node in partition {partition.name}, but the recipe takes "
                f"{needs_gpus}: give another --partition, or gpus-per-node in a --cluster profile"
            )
        update["gpus_per_node"] = partition.gpus
    limit, notes = partition.time_limit_minutes, []
    if limit is not None and cluster.time_limit_minutes > limit:
        update["time_limit_minutes"] = limit
        notes.append(f"time limit {limit} min, the longest that partition {partition.name} gives")
    if cluster.partition is None:
        notes.append(
            f"partition {partition.name} chosen: {partition.nodes} nodes of {partition.cpus} CPUs, "
            f"{partition.gpus} GPUs and {partition.memory_bytes / 1e9:.0f} GB"
        )
    return cluster.model_copy(update=update), notes


def _choose(cluster: Cluster, nodes: int, partitions: list[Partition], gpus: int) -> Partition:
    open_ones = [partition for partition in partitions if partition.up]
    if cluster.partition is not None:
        for partition in partitions:
            if partition.name == cluster.partition:
                return partition
        known = ", ".join(partition.name for partition in partitions) or "none"
        raise BadInput(f"there is no partition {cluster.partition}: give one of {known}")
    if not open_ones:
        raise BadInput("sinfo shows no partition that is up: give --cluster with a profile, or ask the administrators")
    wants_gpus = any(partition.gpus >= gpus for partition in open_ones) and cluster.gpu_request != "none"

    def preference(partition: Partition) -> tuple[bool, bool, int]:
        fits = partition.nodes >= nodes and (partition.gpus >= gpus or not wants_gpus)
        return fits, partition.default, partition.nodes

    return max(open_ones, key=preference)
