"""Preflight findings of a fault-free node, for tests of the checks."""

from __future__ import annotations

from typing import Any


def gpu(**changes: Any) -> dict[str, Any]:
    facts = {
        "bus": "00000000:00:06.0", "uuid": "GPU-1a2b", "name": "NVIDIA H100 80GB HBM3",
        "memory_total": 81559 * 2**20, "memory_used": 0,
        "ecc_uncorrectable": 0, "remap_pending": "No", "remap_failed": "No", "recovery_action": None, "mig": "Disabled",
    }  # fmt: skip
    return {**facts, **changes}


def finding(number: int, **changes: Any) -> dict[str, Any]:
    facts = {
        "host": f"node{number:02d}", "address": f"10.0.0.{number}", "interface": "eth0", "rdma": {},
        "memory_available": 10**12, "memory_group": None, "cpus": 64, "kernel": "6.1.0",
        "versions": {"python": "3.11.2", "torch": "2.13.0"}, "gpus": {},
        "limits": {"open_files": 65536, "locked_memory": None}, "run_folder": None,
        "node_local": {"shared_memory": 10**12, "folder": "/tmp/vime-1000", "free": 10**12, "socket": 80},
        "canary": "word", "space": {},
        "listening": [], "time": 1000.0, "visible_gpus": None,
    }  # fmt: skip
    return {**facts, **changes}
