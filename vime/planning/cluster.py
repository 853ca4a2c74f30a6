"""Cluster profiles: `configs/clusters/NAME.yaml`, or a person's own in `~/.config/vime/clusters/`."""

from __future__ import annotations

import os
import re

from pydantic import ValidationError

from vime.errors import BadInput
from vime.planning.types import Cluster
from vime.recipe import files

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
