"""Digests of the trainer's weights, computed without the sync's moves and buffers, to check a sync.

For each parameter, the first rank that holds shard 0 gathers the other shards, quantises the whole tensors and
fingerprints them, as an engine's worker fingerprints what it received.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from vime.checkpoint.hf import HFCheckpoint
from vime.errors import VimeError
from vime.fp8 import quantise as fp8
from vime.models.namemap import Param
from vime.models.transform import split, unshard
from vime.sync.fingerprint import fingerprint
from vime.sync.parts import Entry
from vime.sync.schedule import Schedule


def trainer_digests(
    schedule: Schedule, rank: int, tensors: Mapping[str, Tensor], checkpoint: HFCheckpoint | None
) -> dict[str, str]:
    """HF name to digest of the tensors assigned to this rank. All ranks call it at the same time.

    `tensors`: this rank's shards by name of the global parameter. Raises WeightNotFinite.
    """
    found: dict[str, str] = {}
    for param, entries in _by_param(schedule).items():
        if entries[0].frozen:
            if rank == 0:
                device = next(iter(tensors.values())).device
                found |= {entry.name: _stored(schedule, entry, checkpoint, device) for entry in entries}
            continue
        holders = schedule.holders(param)
        shards = _gather(param, holders, rank, tensors)
        if shards is not None:
            parts = split(param, unshard(param, shards))
            for entry in entries:
                found[entry.name] = _fresh(schedule, entry, parts[param.parts[entry.part].name])
    return found


def _by_param(schedule: Schedule) -> dict[Param, list[Entry]]:
    found: dict[Param, list[Entry]] = {}
    for bucket in schedule.buckets:
        for entry in bucket.entries:
            found.setdefault(entry.param, []).append(entry)
    return found


def _gather(param: Param, holders: list[int], rank: int, tensors: Mapping[str, Tensor]) -> list[Tensor] | None:
    """All shards on the rank that holds the first one; None on every other rank."""
    if rank not in holders:
        return None
    own = tensors[param.name].detach().contiguous()
    if rank != holders[0]:
        dist.send(own.view(-1).view(torch.uint8), holders[0])
        return None
    shards = [own, *(torch.empty_like(own) for _ in holders[1:])]
    for shard, holder in zip(shards[1:], holders[1:], strict=True):
        dist.recv(shard.view(-1).view(torch.uint8), holder)
    return shards


def _fresh(schedule: Schedule, entry: Entry, whole: Tensor) -> str:
    if not entry.quantised:
        return fingerprint(whole.to(getattr(torch, entry.dtype)))
    config = schedule.config.quantisation
    assert config is not None
    return fingerprint(*fp8.quantise(whole, config.block, scale_format=config.scale_format, name=entry.name))


def _stored(schedule: Schedule, entry: Entry, checkpoint: HFCheckpoint | None, device: torch.device) -> str:
    if checkpoint is None:
        raise VimeError(f"{entry.name} is frozen, but there is no HF checkpoint to take it from")
    if entry.quantised and checkpoint.is_quantised(entry.name):
        return fingerprint(checkpoint.stored(entry.name).to(device), checkpoint.scale(entry.name).to(device))
    return _fresh(schedule, entry, checkpoint.tensor(entry.name).to(device))
