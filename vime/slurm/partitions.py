"""Partitions and their kinds of nodes as sinfo reports them. Pure but for the call."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vime.slurm.client import SlurmError, call
from vime.slurm.queue import parse_limit

FORMAT = "%R|%P|%a|%D|%c|%m|%G|%l|%f"
"""Partition, the same with `*` for the default, availability, nodes, CPUs, MB of memory, GRES, time limit, features."""
UNCONFIGURED_MB = 1
"""Largest memory that sinfo shows where RealMemory is not configured, in MB."""
_SLICE = re.compile(r"\d+g\.\d+gb", re.IGNORECASE)
"""In the type of a MIG slice: `1g.10gb`, `nvidia_h100_80gb_hbm3_3g.40gb`."""


@dataclass(frozen=True)
class NodeKind:
    """Nodes of a partition that are alike."""

    nodes: int
    cpus: int
    memory_bytes: int | None
    """None where it is not configured in Slurm."""
    gpus: Mapping[str, int] = field(default_factory=dict)
    """Whole GPUs of a node by type; the type is empty where Slurm names none. MIG slices and shards are none."""
    slices: int = 0
    """MIG slices of a node."""
    features: frozenset[str] | None = None
    """None where sinfo did not report them."""

    @property
    def gpu_count(self) -> int:
        """Whole GPUs of a node."""
        return sum(self.gpus.values())

    def __str__(self) -> str:
        gpus = ", ".join(f"{count} {kind}".rstrip() for kind, count in self.gpus.items())
        shown = gpus or (f"{self.slices} MIG slices" if self.slices else "no GPUs")
        return f"{self.nodes} nodes of {shown}"


@dataclass(frozen=True)
class Partition:
    """One partition."""

    name: str
    default: bool
    up: bool
    time_limit_minutes: int | None
    kinds: tuple[NodeKind, ...]

    @property
    def nodes(self) -> int:
        """Nodes of all kinds."""
        return count(self.kinds)


def count(kinds: Iterable[NodeKind]) -> int:
    return sum(kind.nodes for kind in kinds)


def has_slurm() -> bool:
    """True where sbatch and sinfo are installed."""
    return shutil.which("sbatch") is not None and shutil.which("sinfo") is not None


def query_partitions(timeout_s: float = 20.0) -> list[Partition]:
    """All partitions. Raises SlurmError where sinfo fails, is silent, or reports none."""
    # --exact: without it nodes of several sizes are one line, with the smallest size.
    text = call("sinfo", "--noheader", "--exact", f"--format={FORMAT}", seconds=timeout_s)
    if not (found := parse_partitions(text)):
        said = next((line.strip() for line in text.splitlines() if line.strip()), "nothing")
        raise SlurmError(f"sinfo shows no partition: it says {said[:200]!r}")
    return found


def parse_partitions(text: str) -> list[Partition]:
    """Partitions of sinfo's lines in `FORMAT`, each line a kind of node; features may be missing.

    A line that is not of this shape (a site's notice, a header of clusters) is skipped.
    """
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.strip().split("|")
        if len(fields) not in (8, 9) or not all(re.fullmatch(r"\d+\+?", number) for number in fields[3:6]):
            continue
        name, shown, state, nodes, cpus, memory, gres, limit = fields[:8]
        kind = NodeKind(
            nodes=int(nodes.rstrip("+")),
            cpus=int(cpus.rstrip("+")),
            memory_bytes=_memory(int(memory.rstrip("+"))),
            gpus=parse_gpus(gres),
            slices=parse_slices(gres),
            features=_features(fields[8]) if len(fields) == 9 else None,
        )
        before = found.get(name)
        found[name] = Partition(
            name=name,
            default=shown.endswith("*") or (before is not None and before.default),
            up=state.startswith("up") or (before is not None and before.up),
            time_limit_minutes=parse_limit(limit),
            kinds=(*(before.kinds if before else ()), kind),
        )
    return list(found.values())


def parse_gpus(gres: str) -> dict[str, int]:
    """Whole GPUs by type in a list of GRES, as `gpu:h100:8(S:0-1),shard:h100:64,gpu:1g.10gb:7`."""
    gpus: dict[str, int] = {}
    for kind, number in _gpus(gres):
        if not _SLICE.search(kind):
            gpus[kind] = gpus.get(kind, 0) + number
    return gpus


def parse_slices(gres: str) -> int:
    """MIG slices in a list of GRES."""
    return sum(number for kind, number in _gpus(gres) if _SLICE.search(kind))


def _gpus(gres: str) -> list[tuple[str, int]]:
    found = re.findall(r"(?:^|,)gpu:(?:([^:,()]+):)?(\d+)", gres)
    return [(kind, int(number)) for kind, number in found]


def _memory(megabytes: int) -> int | None:
    return megabytes * 2**20 if megabytes > UNCONFIGURED_MB else None


def _features(text: str) -> frozenset[str]:
    return frozenset(word for word in text.split(",") if word and word != "(null)")


def satisfies(constraint: str, features: frozenset[str]) -> bool | None:
    """True if a node with these features can serve a constraint such as `h100&(ib|roce)`; None for unknown syntax.

    `[a|b]` and counts (`a*4`) are about all nodes together: each node serves one of the alternatives.
    """
    tokens: list[str] = re.findall(r"[A-Za-z0-9_.=-]+(?:\*\d+)?|[&|,()\[\]]", constraint)
    if "".join(tokens) != re.sub(r"\s", "", constraint):
        return None
    words = {"&": " and ", ",": " and ", "|": " or ", "[": "(", "]": ")"}
    terms: list[str] = [words.get(token, token) for token in tokens]
    try:
        value, rest = _any_of(terms, features)
    except IndexError:
        return None
    return value if not rest else None


def _any_of(terms: list[str], features: frozenset[str]) -> tuple[bool, list[str]]:
    value, rest = _all_of(terms, features)
    while rest and rest[0] == " or ":
        other, rest = _all_of(rest[1:], features)
        value = value or other
    return value, rest


def _all_of(terms: list[str], features: frozenset[str]) -> tuple[bool, list[str]]:
    value, rest = _term(terms, features)
    while rest and rest[0] == " and ":
        other, rest = _term(rest[1:], features)
        value = value and other
    return value, rest


def _term(terms: list[str], features: frozenset[str]) -> tuple[bool, list[str]]:
    if terms[0] == "(":
        value, rest = _any_of(terms[1:], features)
        if rest[0] != ")":
            raise IndexError
        return value, rest[1:]
    return terms[0].partition("*")[0] in features, terms[1:]
