"""Loading of an HF checkpoint directly into the shards of a Megatron model, without a conversion on disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vime.checkpoint.hf import HFCheckpoint
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.local import fill, local_tensors
from vime.models.namemap import Param
from vime.models.shards import local_shape, needed_slices, tensor_split
from vime.recipe.parallel import Coordinates, ParallelLayout

if TYPE_CHECKING:
    from torch.nn import Module


def read_shard(
    checkpoint: HFCheckpoint,
    param: Param,
    layout: ParallelLayout,
    coords: Coordinates,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A rank's shard of a parameter; reads only the boxes that it needs. Rows that pad the vocabulary are zero."""
    shape = local_shape(param, tensor_split(param, layout, coords)[1])
    boxes = needed_slices(param, layout, coords)
    reads = (checkpoint.read(param.parts[box.part].name, box.start, box.size, dtype) for box in boxes)
    if len(boxes) == 1 and boxes[0].size == shape:
        return next(reads)
    target: torch.Tensor | None = None
    for box, values in zip(boxes, reads, strict=True):
        if target is None:
            target = torch.zeros(shape, dtype=dtype or values.dtype)
        target[box.target] = values.to(target.dtype)
    return torch.zeros(shape, dtype=dtype or torch.bfloat16) if target is None else target


def load_hf_into(
    chunks: Sequence[Module],
    checkpoint: HFCheckpoint,
    config: ModelConfig,
    layout: ParallelLayout,
    coords: Coordinates,
) -> None:
    """Fill this rank's model chunks (as built by `build_model`) with its shards, in the model's dtypes.

    Every rank reads its part by itself, without communication. Raises BadInput, before a weight is changed, for a
    checkpoint that does not fit the model.
    """
    checkpoint.check(params_of(config))
    fill(local_tensors(chunks, config, layout, coords), lambda param: read_shard(checkpoint, param, layout, coords))
