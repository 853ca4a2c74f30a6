"""Rank of this process, from the environment of torchrun, Slurm or vime's own stages."""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from vime.errors import BadInput
from vime.run.tokens import group_key
from vime.system.rendezvous import group_store

# Above the ports of services, below the ephemeral range.
_FIRST_PORT, _PORTS = 20000, 10000


@dataclass(frozen=True)
class Ranks:
    """Rank of this process, number of ranks, and rank 0's address (None: there is only one process)."""

    rank: int = 0
    world_size: int = 1
    address: str | None = None
    port: int = 0
    key: bytes | None = None
    """Key of the group in a stage of a run; None when started by hand."""


def from_environment(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Ranks from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT if set, else from a Slurm step, else a single one."""
    rank, world = rank_and_size(environ)
    if world == 1:
        return Ranks()
    address = environ.get("MASTER_ADDR") or _first_host(environ)
    # Every process of a step computes the same port; two jobs on a node rarely share one.
    own = _FIRST_PORT + int(environ.get("SLURM_JOB_ID", "0")) % _PORTS
    return Ranks(
        rank, world, address, _number(environ, "MASTER_PORT") if "MASTER_PORT" in environ else own, group_key(environ)
    )


def rank_and_size(environ: Mapping[str, str]) -> tuple[int, int]:
    """RANK and WORLD_SIZE if set, else those of a Slurm step, else 0 of 1."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        rank, world = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS")
    else:
        return 0, 1
    if not 0 <= rank < world:
        raise BadInput(f"rank {rank} of {world} in the environment: RANK must be below WORLD_SIZE")
    return rank, world


@contextlib.contextmanager
def process_group(ranks: Ranks, timeout: datetime.timedelta) -> Iterator[None]:
    """Default process group over gloo; a collective that waits longer than `timeout` fails."""
    if ranks.address is None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            "gloo",
            store=group_store(ranks.address, ranks.port, ranks.rank, ranks.world_size, timeout, ranks.key),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
        )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except (KeyError, ValueError) as error:
        raise BadInput(
            f"{name} is {environ.get(name)!r} in the environment: start this with torchrun or srun"
        ) from error


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise BadInput("MASTER_ADDR is not set: start this with torchrun, or with srun inside a Slurm job")
    command = ["scontrol", "show", "hostnames", nodes]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"cannot find out the first node of {nodes} ({error}): set MASTER_ADDR") from error
    return done.stdout.split()[0]
