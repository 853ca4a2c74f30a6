"""Cluster profiles: `configs/clusters/NAME.yaml`, or a person's own in `~/.config/vime/clusters/`."""

from __future__ import annotations

import os
import re

from pydantic import ValidationError

from vime.errors import BadInput
from vime.recipe import files
from vime.run.plan import Cluster
from vime.slurm.partitions import Partition

OWN_OPTIONS = {
    "output": "", "error": "", "open-mode": "", "signal": "", "requeue": "", "no-requeue": "", "job-name": "",
    "dependency": "", "kill-on-invalid-dep": "", "array": "", "nodes": "--nodes", "ntasks": "", "ntasks-per-node": "",
    "wrap": "", "time": "time-limit-minutes", "partition": "partition", "account": "account", "qos": "qos",
    "constraint": "constraint", "mem": "mem", "exclusive": "exclusive", "cpus-per-task": "cpus-per-node",
    "gres": "gpu-request and gpus-per-node", "gpus-per-node": "gpus-per-node",
}  # fmt: skip
"""Options of sbatch that a profile does not set by itself, and what to use in their place; empty: nothing."""


def load_cluster(name_or_path: str) -> Cluster:
    """The profile of this name or in this file; dashes and underscores in its options are the same."""
    path = files.find("clusters", name_or_path)
    values = {str(key).replace("-", "_"): value for key, value in files.read(path).items()}
    try:
        cluster = Cluster(**{"name": path.stem, **values})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"]).replace("_", "-")
        raise BadInput(f"{path}: {place} is {problem['input']!r}: {problem['msg'].lower()}") from error
    for option in cluster.extra_sbatch:
        if (name := option.lstrip("-").replace("_", "-")) in OWN_OPTIONS:
            advice = f"give it as {place}" if (place := OWN_OPTIONS[name]) else "vime sets it"
            raise BadInput(f"{path}: extra-sbatch has {option}: {advice}")
    return cluster


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_minutes(text: str) -> int:
    """Minutes of a time in Slurm's spelling: `90`, `1:30:00`, `2-00`, `2-12:00`, `2-12:00:00`; seconds round up."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise BadInput(f"--time is {text!r}: give minutes, hours:minutes:seconds or days-hours")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) + (seconds > 0)
    if not total:
        raise BadInput(f"--time is {text!r}: give at least a minute")
    return total


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
