"""The state of a node's GPUs, from `nvidia-smi -q -x` and, where it may be read, the kernel's log."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from typing import Any

CALL_SECONDS = 60.0
"""A GPU that hangs makes nvidia-smi hang."""
XID_AGE_S = 24 * 3600.0
HARDWARE_XIDS = {
    48: "double-bit ECC error",
    62: "internal micro-controller halted",
    64: "row remapping failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "many single-bit ECC errors",
    95: "uncontained memory error",
    119: "GSP does not answer",
    120: "GSP error",
    140: "unrecovered ECC error",
}
"""Xids that tell of the hardware and not of a program, after NVIDIA's catalogue of Xid errors."""
_XID = re.compile(r"^(\S+)\s.*NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\)\D*(\d+)")


def gpu_facts() -> dict[str, Any]:
    """`driver`, `cuda`, `gpus` (a mapping a GPU) and `xids` of this node; `error` where nvidia-smi fails or hangs.

    Empty where there is no nvidia-smi.
    """
    if shutil.which("nvidia-smi") is None:
        return {}
    try:
        argv = ("nvidia-smi", "-q", "-x")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=CALL_SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"error": f"nvidia-smi did not answer within {CALL_SECONDS:.0f} s"}
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        return {"error": f"nvidia-smi exited with {done.returncode}: {words[-1] if words else 'no message'}"}
    try:
        found = parse_smi(done.stdout)
    except ElementTree.ParseError as error:
        return {"error": f"nvidia-smi's answer is not XML: {error}"}
    return {**found, "xids": parse_xids(_kernel_log(), datetime.datetime.now().astimezone())}


def parse_smi(text: str) -> dict[str, Any]:
    """The facts in nvidia-smi's XML. What a driver or a GPU does not tell (`N/A`, no element) is None."""
    root = ElementTree.fromstring(text)
    return {
        "driver": root.findtext("driver_version"),
        "cuda": root.findtext("cuda_version"),
        "gpus": [_parse_gpu(gpu) for gpu in root.iter("gpu")],
    }


def _parse_gpu(gpu: ElementTree.Element) -> dict[str, Any]:
    volatile = gpu.find("ecc_errors/volatile")
    counts = [] if volatile is None else [_number(item) for item in volatile if "uncorrectable" in item.tag]
    known = [count for count in counts if count is not None]
    action = _told(gpu.findtext("gpu_recovery_action"))
    return {
        "bus": gpu.get("id", ""),
        "uuid": gpu.findtext("uuid"),
        "name": gpu.findtext("product_name"),
        "memory_total": _mebibytes(gpu.find("fb_memory_usage/total")),
        "memory_used": _mebibytes(gpu.find("fb_memory_usage/used")),
        "ecc_uncorrectable": sum(known) if known else None,
        "remap_pending": _told(gpu.findtext("remapped_rows/remapped_row_pending")),
        "remap_failed": _told(gpu.findtext("remapped_rows/remapped_row_failure")),
        "recovery_action": None if action == "None" else action,
        "mig": _told(gpu.findtext("mig_mode/current_mig")),
    }


def parse_xids(log: str, now: datetime.datetime) -> list[dict[str, Any]]:
    """Xids of the last day that tell of hardware, from `dmesg --time-format=iso`."""
    found = []
    for line in log.splitlines():
        match = _XID.match(line)
        if match is None or int(match[3]) not in HARDWARE_XIDS:
            continue
        when = datetime.datetime.fromisoformat(match[1].replace(",", "."))
        if (now - when).total_seconds() <= XID_AGE_S:
            found.append({"bus": match[2], "xid": int(match[3]), "meaning": HARDWARE_XIDS[int(match[3])]})
    return found


def _kernel_log() -> str:
    """The kernel's messages; nothing where only root may read them."""
    try:
        argv = ("dmesg", "--time-format=iso")
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _told(text: str | None) -> str | None:
    return None if text is None or text.strip() in ("N/A", "") else text.strip()


def _number(element: ElementTree.Element) -> int | None:
    text = _told(element.text)
    return int(text) if text is not None and text.isdigit() else None


def _mebibytes(element: ElementTree.Element | None) -> int | None:
    """Bytes of `81559 MiB`."""
    words = "" if element is None else _told(element.text) or ""
    match = re.fullmatch(r"(\d+) MiB", words)
    return int(match[1]) * 2**20 if match else None
