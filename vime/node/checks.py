"""Checks of preflight's findings: reasons to reject a node. Pure functions, one per check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vime.errors import Cause
from vime.planning.memory import object_store_bytes
from vime.run.devices import node_slots
from vime.run.messages import Report
from vime.run.node_local import NODE_TMP, SOCKET_CHARACTERS
from vime.run.plan import Plan

Findings = Mapping[int, Mapping[str, Any]]
"""Reports of vime.node.preflight, by place in the allocation."""

CLOCK_SKEW_S = 2.0
"""Largest clock skew: times of logs, files and tokens are compared between nodes."""
OPEN_FILES = 8192
"""Open files that Ray's processes and the engines on a node need at the same time."""
ENGINE_SHARED_MEMORY, RANK_SHARED_MEMORY = 160 * 2**20, 32 * 2**20
"""Bytes of /dev/shm per vLLM engine (message queue) and per trainer rank (NCCL)."""
NODE_LOCAL_BYTES, NODE_LOCAL_BYTES_GPU = 2 * 10**8, 4 * 10**9
"""Disk for Ray's logs and sockets; with GPUs also for caches of compiled kernels."""
GPU_MEMORY_IN_USE = 2 * 2**30
"""Bytes on an idle GPU above the use of the driver and its services; more means that the GPU is taken."""


@dataclass(frozen=True)
class Problem:
    """One reason to reject a node."""

    place: int
    node: str
    check: str
    value: str
    need: str
    cause: Cause = Cause.PREFLIGHT

    def __str__(self) -> str:
        return f"{self.node}: {self.check} is {self.value}, needs {self.need}"


@dataclass(frozen=True)
class Known:
    """Facts about the nodes that do not come from their reports."""

    job_memory: Mapping[int, int] = field(default_factory=dict)
    """Bytes of host memory that Slurm gives the job on a node, by place."""
    moments: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Controller's Unix time before and after a node read its clock, by place."""
    canary: str = ""
    """Word that every node must find in the run folder."""
    unseen: Sequence[int] = ()
    """Places whose own file in the run folder is invisible to the controller."""
    failures: Mapping[str, int] = field(default_factory=dict)
    """Failures in this run by host, for hosts that failed too often."""


def problems(plan: Plan, findings: Findings, known: Known) -> list[Problem]:
    """All problems of all nodes, by check."""
    checks = [
        _memory(plan, findings, known),
        _shared_folder(plan, findings, known),
        _space(plan, findings),
        _addresses(plan, findings),
        _gpus(plan, findings),
        _versions(findings),
        _rdma(plan, findings),
        _limits(plan, findings),
        _node_local(plan, findings),
        _clocks(findings, known),
        _failures(findings, known),
    ]
    return [problem for check in checks for problem in check]


def _memory(plan: Plan, findings: Findings, known: Known) -> Iterator[Problem]:
    """Memory for the largest logical node, since any node may become it."""
    need = max((node.host_memory.total_bytes for node in plan.nodes), default=0)
    for place, found in sorted(findings.items()):
        limits = {"available host memory": found["memory_available"]}
        if found["memory_group"] is not None:
            limits["host memory left in the job's memory group"] = found["memory_group"]
        if place in known.job_memory:
            limits["host memory that Slurm gives the job"] = known.job_memory[place]
        name, least = min(limits.items(), key=lambda item: item[1])
        if least < need:
            yield Problem(place, found["host"], name, gb(least), gb(need))


def _shared_folder(plan: Plan, findings: Findings, known: Known) -> Iterator[Problem]:
    name = f"run folder {plan.run_dir}"
    for place, found in sorted(findings.items()):
        if found["run_folder"] is not None:
            yield Problem(place, found["host"], name, found["run_folder"], "to be shared and writable")
        elif found["canary"] != known.canary:
            yield Problem(place, found["host"], name, "another one than the controller's", "to be shared by all nodes")
        elif place in known.unseen:
            text = "one whose files the controller does not see"
            yield Problem(place, found["host"], name, text, "to be shared by all nodes")


def _space(plan: Plan, findings: Findings) -> Iterator[Problem]:
    """Free bytes of every file system, against the bytes that the stages will write there."""
    outputs = {output.path: output.bytes or 0 for stage in plan.stages for output in stage.outputs}
    for place, found in sorted(findings.items()):
        free: dict[int, tuple[str, int]] = {}
        need: Counter[int] = Counter()
        for path, space in found["space"].items():
            free.setdefault(space["device"], (path, space["free"]))
            need[space["device"]] += max(0, outputs.get(path, 0) - space["present"])
        for device, (path, left) in free.items():
            if left < need[device]:
                yield Problem(place, found["host"], f"free space for {path}", gb(left), gb(need[device]))


def _addresses(plan: Plan, findings: Findings) -> Iterator[Problem]:
    wanted = plan.cluster.network_interface
    for place, found in sorted(findings.items()):
        if not found["address"]:
            yield Problem(place, found["host"], f"interface {wanted}", "without an address", "an IPv4 address")
    if plan.cluster.one_machine or len(findings) == 1:
        return
    count = Counter(found["address"] for found in findings.values() if found["address"])
    for place, found in sorted(findings.items()):
        if count[found["address"]] > 1 or found["address"].startswith("127."):
            yield Problem(place, found["host"], "address", found["address"], "one of its own that other nodes reach")


def _gpus(plan: Plan, findings: Findings) -> Iterator[Problem]:
    if not plan.on_gpu:
        return
    used = _used(plan)
    count = len(used)
    for place, found in sorted(findings.items()):
        told, host = found["gpus"], found["host"]
        if "gpus" not in told:
            yield Problem(place, host, "nvidia-smi", told.get("error", "missing"), "to tell of the GPUs")
            continue
        if len(told["gpus"]) < count:
            yield Problem(place, host, "number of GPUs", str(len(told["gpus"])), str(count))
        for number, gpu in _planned(told["gpus"], used, found.get("visible_gpus")):
            for check, value, need in _gpu_faults(gpu):
                yield Problem(place, host, f"{check} of GPU {number} ({gpu['bus']})", value, need)
        for xid in told["xids"]:
            text = f"Xid {xid['xid']} ({xid['meaning']})"
            yield Problem(place, host, f"kernel message about GPU {xid['bus']}", text, "none in the last day")
    for name, label in (("name", "GPU model"), ("memory_total", "GPU memory")):
        kinds = {
            place: str(sorted({gpu[name] for gpu in found["gpus"].get("gpus", ())}, key=str))
            for place, found in findings.items()
        }
        yield from _odd_ones(label, kinds, findings)


def _used(plan: Plan) -> set[int]:
    """Indices of the GPUs that the run uses on any host."""
    return {slot for node in plan.nodes for slot in node_slots(plan, node.index)}


def _planned(
    gpus: Sequence[Mapping[str, Any]], used: Collection[int], visible: str | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """GPUs of a host that the run uses, named by index or UUID; all of them if no name matches."""
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    taken = [name for place, name in enumerate(names) if place in used] if names else [str(number) for number in used]
    chosen = [
        (number, gpu)
        for number, gpu in enumerate(gpus)
        if any(name == str(number) or (name.startswith("GPU-") and gpu["uuid"] == name) for name in taken)
    ]
    yield from chosen or enumerate(gpus)


def broken_gpus(plan: Plan, told: Mapping[str, Any], visible: str | None) -> list[str]:
    """Faults of the run's GPUs on a node after training failed.

    `told` is the result of `vime.node.gpus.gpu_facts`, `visible` the node's CUDA_VISIBLE_DEVICES.

    Preflight found the GPUs whole, so a fault arose during the run. Memory in use is no fault: it is the run's own.
    """
    if "gpus" not in told:
        return [told.get("error", "nvidia-smi is missing")]
    used = _used(plan)
    missing = [f"{len(told['gpus'])} of {len(used)} GPUs are left"] if len(told["gpus"]) < len(used) else []
    faults = [
        f"GPU {number} ({gpu['bus']}): {check} {value}"
        for number, gpu in _planned(told["gpus"], used, visible)
        for check, value, _ in _gpu_faults({**gpu, "memory_used": 0, "mig": None})
    ]
    return missing + faults + [f"GPU {xid['bus']}: Xid {xid['xid']} ({xid['meaning']})" for xid in told["xids"]]


def _gpu_faults(gpu: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(check, value, need) of every fault of a GPU; a missing value is no fault."""
    if gpu["ecc_uncorrectable"]:
        yield "uncorrectable ECC errors since boot", str(gpu["ecc_uncorrectable"]), "0"
    if gpu["remap_pending"] == "Yes":
        yield "row remapping", "pending", "a reset of the GPU"
    if gpu["remap_failed"] == "Yes":
        yield "row remapping", "failed", "another GPU"
    if gpu["recovery_action"] is not None:
        yield "recovery action", gpu["recovery_action"], "none"
    if gpu["mig"] == "Enabled":
        yield "MIG mode", "enabled", "whole GPUs"
    if (gpu["memory_used"] or 0) > GPU_MEMORY_IN_USE:
        yield "memory in use", gb(gpu["memory_used"]), "a GPU that nobody uses"


def _versions(findings: Findings) -> Iterator[Problem]:
    for name in sorted({name for found in findings.values() for name in found["versions"]}):
        have = {place: found["versions"].get(name, "missing") for place, found in findings.items()}
        yield from _odd_ones(f"version of {name}", have, findings)


def _rdma(plan: Plan, findings: Findings) -> Iterator[Problem]:
    """Active ports that other nodes have: NCCL would wait for a node without one. Extra ports do no harm."""
    if not uses_rdma(plan):
        return
    have = {
        place: tuple(port for port, state in sorted(found["rdma"].items()) if state == "ACTIVE")
        for place, found in findings.items()
    }
    common = Counter(have.values()).most_common(1)[0][0]
    for place, ports in sorted(have.items()):
        if set(common) - set(ports):
            text = f"{' '.join(common)}, as on other nodes"
            yield Problem(place, findings[place]["host"], "list of active RDMA ports", " ".join(ports) or "empty", text)


def uses_rdma(plan: Plan) -> bool:
    """False if the profile or the recipe disables RDMA for NCCL."""
    env = {**plan.cluster.env, **plan.recipe.misc.env}
    return env.get("NCCL_IB_DISABLE", "0") == "0" and env.get("NCCL_NET", "").lower() != "socket"


def _limits(plan: Plan, findings: Findings) -> Iterator[Problem]:
    for place, found in sorted(findings.items()):
        files, locked = found["limits"]["open_files"], found["limits"]["locked_memory"]
        if files is not None and files < OPEN_FILES:
            yield Problem(place, found["host"], "limit of open files (ulimit -Hn)", str(files), str(OPEN_FILES))
        if uses_rdma(plan) and "ACTIVE" in found["rdma"].values() and locked is not None:
            need = "unlimited for RDMA (without RDMA set NCCL_IB_DISABLE to 1 in the profile's env)"
            yield Problem(place, found["host"], "limit of locked memory (ulimit -Hl)", gb(locked), need)


def shared_memory_bytes(plan: Plan) -> int:
    """Bytes of /dev/shm used on the fullest node: Ray's object store, vLLM's queues, NCCL's buffers."""
    engines = max((len(node.engines) for node in plan.nodes), default=0)
    ranks = max((len(node.ranks) for node in plan.nodes), default=0) if plan.on_gpu else 0
    return object_store_bytes(plan.recipe) + engines * ENGINE_SHARED_MEMORY + ranks * RANK_SHARED_MEMORY


def _node_local(plan: Plan, findings: Findings) -> Iterator[Problem]:
    """Sizes that a container or a small disk may limit."""
    shared = shared_memory_bytes(plan)
    space = NODE_LOCAL_BYTES_GPU if plan.on_gpu else NODE_LOCAL_BYTES
    for place, found in sorted(findings.items()):
        host, local = found["host"], found["node_local"]
        if local["shared_memory"] < shared:
            need = f"{gb(shared)} (Ray's object store, engines): a container needs a larger --shm-size"
            yield Problem(place, host, "free space of /dev/shm", gb(local["shared_memory"]), need)
        if local["free"] < space:
            need = f"{gb(space)}, or {NODE_TMP} on another disk"
            yield Problem(place, host, f"free space for node-local files in {local['folder']}", gb(local["free"]), need)
        if local["socket"] > SOCKET_CHARACTERS:
            need = f"at most {SOCKET_CHARACTERS} characters: set {NODE_TMP} to a shorter folder"
            value = f"{local['socket']} characters long"
            yield Problem(place, host, f"path of a socket below {local['folder']}", value, need)


def _clocks(findings: Findings, known: Known) -> Iterator[Problem]:
    """Skew of a node's clock, which it read between two moments of the controller's clock."""
    for place, found in sorted(findings.items()):
        first, last = known.moments.get(place, (found["time"], found["time"]))
        ahead, behind = found["time"] - last, first - found["time"]
        if max(ahead, behind) > CLOCK_SKEW_S:
            text = f"{max(ahead, behind):.0f} s {'ahead of' if ahead > 0 else 'behind'} the controller's"
            yield Problem(place, found["host"], "clock", text, f"to be within {CLOCK_SKEW_S:.0f} s")


def _failures(findings: Findings, known: Known) -> Iterator[Problem]:
    for place, found in sorted(findings.items()):
        if count := known.failures.get(found["host"]):
            need = "a node that failed at most once"
            yield Problem(place, found["host"], "number of failures in this run", str(count), need, Cause.NODE_FAILURE)


def _odd_ones(check: str, have: Mapping[int, str], findings: Findings) -> Iterator[Problem]:
    """Nodes whose value differs from the most common one."""
    common = Counter(have.values()).most_common(1)[0][0]
    for place, value in sorted(have.items()):
        if value != common:
            yield Problem(place, findings[place]["host"], check, value, f"{common}, as on other nodes")


def gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB"


def slow_nodes(reports: Sequence[Report], places: Sequence[int], floor_gbit: float) -> Iterator[Problem]:
    """Nodes below the floor: those with slow links to both neighbours, else the sender of a slow link.

    A slow node slows its neighbours' links too, so one slow link alone does not show which end is slow.
    """
    ring = sorted(reports, key=lambda told: told.rank)
    incoming = [told.data["received"] * 8 / 1e9 for told in ring]
    outgoing = [incoming[(i + 1) % len(ring)] for i in range(len(ring))]
    both = {i for i in range(len(ring)) if max(incoming[i], outgoing[i]) < floor_gbit}
    senders = {i for i in range(len(ring)) if outgoing[i] < floor_gbit and not {i, (i + 1) % len(ring)} & both}
    for i in sorted(both | senders):
        value = max(incoming[i], outgoing[i]) if i in both else outgoing[i]
        told, need = ring[i], f"{floor_gbit:.3g} Gbit/s"
        yield Problem(places[told.rank], told.data["host"], "network bandwidth", f"{value:.3g} Gbit/s", need)
