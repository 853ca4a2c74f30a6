"""Conversion between HF tensors, whole Megatron parameters and tensor-parallel shards, by the pieces of `shards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from vime.models.namemap import Join, Param
from vime.models.shards import local_shape, pieces, tensor_split
from vime.recipe.parallel import Coordinates, ParallelLayout


def join(param: Param, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Build the whole parameter from its HF tensors (by name). A single part is returned as is, without a copy."""
    return _assemble(param, parts, 0, 1)


def split(param: Param, whole: torch.Tensor) -> dict[str, torch.Tensor]:
    """HF tensors of a whole parameter, as views if the layout allows."""
    _check(param.name, whole.shape, param.shape)
    if param.join == Join.SINGLE:
        return {param.parts[0].name: whole}
    if param.join == Join.STACK:
        heights = [part.shape[0] for part in param.parts]
        return {part.name: rows for part, rows in zip(param.parts, whole.split(heights), strict=True)}
    return split_shards(param, [whole])


def shard(param: Param, whole: torch.Tensor, layout: ParallelLayout, coords: Coordinates) -> torch.Tensor:
    """A rank's shard of a whole parameter; rows that pad the vocabulary are zero."""
    index, shards = tensor_split(param, layout, coords)
    return whole if shards == 1 else _assemble(param, split(param, whole), index, shards)


def shard_parts(
    param: Param, parts: Mapping[str, torch.Tensor], layout: ParallelLayout, coords: Coordinates
) -> torch.Tensor:
    """A rank's shard, directly from the HF tensors."""
    return _assemble(param, parts, *tensor_split(param, layout, coords))


def unshard(param: Param, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The whole parameter from all its tensor-parallel shards in order (one shard if replicated)."""
    if len(shards) == 1:
        return shards[0]
    return join(param, split_shards(param, shards))


def split_shards(param: Param, shards: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """HF tensors from all tensor-parallel shards in order, without building the whole parameter."""
    parts = {part.name: shards[0].new_empty(part.shape) for part in param.parts}
    for index, one in enumerate(shards):
        _check(param.name, one.shape, local_shape(param, len(shards)))
        for piece in pieces(param, index, len(shards)):
            parts[param.parts[piece.part].name][piece.source] = one[piece.target]
    return parts


def _assemble(param: Param, parts: Mapping[str, torch.Tensor], index: int, shards: int) -> torch.Tensor:
    tensors = [parts[part.name] for part in param.parts]
    for part, tensor in zip(param.parts, tensors, strict=True):
        _check(part.name, tensor.shape, part.shape)
    shape, boxes = local_shape(param, shards), pieces(param, index, shards)
    if len(boxes) == 1 and boxes[0].size == shape:
        return tensors[boxes[0].part][boxes[0].source]
    found = tensors[0].new_zeros(shape)
    for piece in boxes:
        found[piece.target] = tensors[piece.part][piece.source]
    return found


def _check(name: str, got: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(got) != tuple(wanted):
        raise ValueError(f"{name}: shape {tuple(got)}, expected {tuple(wanted)}")
