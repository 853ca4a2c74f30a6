"""Cluster profiles: `configs/clusters/NAME.yaml`, or the user's in `~/.config/vime/clusters/`."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from pydantic import ValidationError

from vime.errors import BadInput
from vime.recipe import files
from vime.run.plan import Cluster
from vime.slurm.partitions import NodeKind, Partition, count, satisfies

OWN_OPTIONS = {
    "output": "", "error": "", "open-mode": "", "signal": "", "requeue": "", "no-requeue": "", "job-name": "",
    "dependency": "", "kill-on-invalid-dep": "", "array": "", "nodes": "--nodes", "ntasks": "", "ntasks-per-node": "",
    "wrap": "", "time": "time-limit-minutes", "partition": "partition", "account": "account", "qos": "qos",
    "constraint": "constraint", "mem": "mem", "exclusive": "exclusive", "cpus-per-task": "cpus-per-node",
    "gres": "gpu-request and gpus-per-node", "gpus-per-node": "gpus-per-node",
}  # fmt: skip
"""sbatch options that a profile must not set, each with its replacement; empty: none."""


def load_cluster(name_or_path: str) -> Cluster:
    """Load the profile with this name or path; dashes and underscores in its options are equivalent."""
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
    """Memory of this machine in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def parse_minutes(text: str) -> int:
    """Minutes of a Slurm time: `90`, `1:30:00`, `2-00`, `2-12:00`, `2-12:00:00`; seconds round up."""
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


def parse_hold(text: str) -> float:
    """Minutes of `4h`, `30m` or a Slurm time."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([hm])", text.strip())
    if match is None:
        try:
            return float(parse_minutes(text))
        except BadInput as error:
            raise BadInput(f"--hold is {text!r}: give hours or minutes, as 4h or 30m") from error
    minutes = float(match[1]) * (60 if match[2] == "h" else 1)
    if not minutes:
        raise BadInput(f"--hold is {text!r}: give more than nothing")
    return minutes


@dataclass(frozen=True)
class Match:
    """A partition and the kinds of its nodes that a job of this run may get."""

    partition: Partition
    kinds: tuple[NodeKind, ...]
    gpu_type: str | None
    """GPU type to name in the request, so that only these kinds serve it; None: any."""

    @property
    def nodes(self) -> int:
        return count(self.kinds)


def resolve(cluster: Cluster, nodes: int, partitions: list[Partition], *, needs_gpus: int) -> tuple[Cluster, list[str]]:
    """Fill in what the profile leaves open from a partition; returns the cluster, and the choices as notes.

    Sizes are the smallest over the kinds of nodes that the job's request can get, not over the whole partition. If the
    profile names no partition: the default one if it fits, else the fitting one with the most nodes. Raises BadInput
    for a partition that does not exist or has too few nodes.
    """
    match = _choose(cluster, nodes, partitions, needs_gpus)
    partition, kinds = match.partition, match.kinds
    gpus = min(kind.gpu_count if match.gpu_type is None else kind.gpus[match.gpu_type] for kind in kinds)
    if not cluster.gpus_per_node and cluster.gpu_request != "none" and gpus < needs_gpus:
        raise BadInput(
            f"sinfo shows {gpus} GPUs a node in partition {partition.name}, but the recipe takes {needs_gpus} (it has "
            f"{_listed(partition)}): give another --partition, or a --cluster profile with gpus-per-node, and with "
            "gpu-request: none where GPUs are no resource of Slurm (docs/clusters.md)"
        )
    if nodes > match.nodes:
        that = "" if match.nodes == partition.nodes else f" that the request matches, of {_listed(partition)}"
        raise BadInput(
            f"--nodes: the run needs {nodes} nodes, but partition {partition.name} has {match.nodes}{that}: "
            "give fewer nodes or another partition"
        )
    update: dict[str, object] = {"partition": partition.name}
    if cluster.cpus_per_node is None:
        update["cpus_per_node"] = min(kind.cpus for kind in kinds)
    known = [kind.memory_bytes for kind in kinds if kind.memory_bytes is not None]
    memory = min(known) if len(known) == len(kinds) else None
    if cluster.memory_per_node_bytes is None and memory is not None:
        update["memory_per_node_bytes"] = memory
    if not cluster.gpus_per_node and cluster.gpu_request != "none":
        update["gpus_per_node"] = gpus
        if cluster.gpu_type is None and match.gpu_type:
            update["gpu_type"] = match.gpu_type
    limit, notes = partition.time_limit_minutes, []
    if limit is not None and cluster.time_limit_minutes > limit:
        update["time_limit_minutes"] = limit
        notes.append(f"time limit {limit} min, the longest that partition {partition.name} gives")
    if cluster.partition is None:
        size = "memory that Slurm does not know" if memory is None else f"{memory / 1e9:.0f} GB"
        kind = f"{match.gpu_type} " if match.gpu_type else ""
        notes.append(
            f"partition {partition.name} chosen: {match.nodes} nodes of {min(kind.cpus for kind in kinds)} CPUs, "
            f"{gpus} {kind}GPUs and {size}"
        )
    return cluster.model_copy(update=update), notes


def match_kinds(cluster: Cluster, nodes: int, partition: Partition, gpus: int) -> Match:
    """Kinds of a partition's nodes that the job's request can get: those with the profile's constraint, GPU type and
    number of GPUs. Of several GPU types, the one with enough nodes, trying the most numerous first.

    If none matches, returns all kinds, so that an error shows the sizes of the partition. Raises BadInput for a
    constraint or a GPU type that no node has.
    """
    kinds = partition.kinds
    if cluster.constraint is not None:
        kinds = tuple(kind for kind in kinds if _serves(cluster.constraint, kind))
        if not kinds:
            known = sorted({feature for kind in partition.kinds for feature in kind.features or ()})
            raise BadInput(
                f"no node of partition {partition.name} serves constraint {cluster.constraint}: its features are "
                f"{', '.join(known) or 'none'}"
            )
    if cluster.gpu_request == "none":
        return Match(partition, kinds, None)
    wanted = max(gpus, cluster.gpus_per_node)
    if cluster.gpu_type is not None and wanted:
        typed = tuple(kind for kind in kinds if cluster.gpu_type in kind.gpus)
        if not typed and any(name for kind in kinds for name in kind.gpus):
            raise BadInput(
                f"partition {partition.name} has no GPUs of type {cluster.gpu_type}: it has {_listed(partition)}"
            )
        kinds = tuple(kind for kind in typed if kind.gpus[cluster.gpu_type] >= wanted) or typed or kinds
        return Match(partition, kinds, cluster.gpu_type if typed else None)
    if not wanted:
        return Match(partition, kinds, None)
    enough = tuple(kind for kind in kinds if kind.gpu_count >= wanted)
    types = sorted({name for kind in enough for name, number in kind.gpus.items() if name and number >= wanted})
    if len(types) < 2:
        return Match(partition, enough or kinds, None)
    # A job on mixed GPU types would run at the speed of its slowest node.
    matches = [
        Match(partition, tuple(kind for kind in enough if kind.gpus.get(name, 0) >= wanted), name) for name in types
    ]
    return max(matches, key=lambda match: (match.nodes >= nodes, match.nodes))


def _serves(constraint: str, kind: NodeKind) -> bool:
    return kind.features is None or satisfies(constraint, kind.features) is not False


def _listed(partition: Partition) -> str:
    return ", ".join(str(kind) for kind in partition.kinds)


def _choose(cluster: Cluster, nodes: int, partitions: list[Partition], gpus: int) -> Match:
    if cluster.partition is not None:
        for partition in partitions:
            if partition.name == cluster.partition:
                return match_kinds(cluster, nodes, partition, gpus)
        known = ", ".join(partition.name for partition in partitions) or "none"
        raise BadInput(f"there is no partition {cluster.partition}: give one of {known}")
    open_ones = [partition for partition in partitions if partition.up]
    if not open_ones:
        raise BadInput("sinfo shows no partition that is up: give --cluster with a profile, or ask the administrators")
    matches, refused = [], []
    for partition in open_ones:
        try:
            matches.append(match_kinds(cluster, nodes, partition, gpus))
        except BadInput as error:
            refused.append(error)
    if not matches:
        raise refused[0]
    wants_gpus = cluster.gpu_request != "none" and any(_has(match, gpus) for match in matches)

    def preference(match: Match) -> tuple[bool, bool, int]:
        fits = match.nodes >= nodes and (not wants_gpus or _has(match, gpus))
        return fits, match.partition.default, match.nodes

    return max(matches, key=preference)


def _has(match: Match, gpus: int) -> bool:
    return all(kind.gpu_count >= gpus for kind in match.kinds)
