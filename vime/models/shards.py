"""Assignment of parameter parts to ranks, as boxes of HF tensors. Pure arithmetic, without torch.

A `Piece` maps one box of an HF tensor to one box of a rank's shard. Everything that joins, splits, shards, reads or
writes weights uses the pieces, so that Megatron's parameter layout is defined in one place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.families import stage_of
from vime.models.namemap import Join, Param, Where
from vime.recipe.parallel import Coordinates, ParallelLayout


@dataclass(frozen=True)
class Piece:
    """A box of one HF tensor and its place in the shard. All tuples have one entry per dimension."""

    part: int
    """Index into `Param.parts`."""
    start: tuple[int, ...]
    """First element in the HF tensor."""
    size: tuple[int, ...]
    at: tuple[int, ...]
    """First element in the shard."""

    @property
    def source(self) -> tuple[slice, ...]:
        """The box as an index into the HF tensor."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    @property
    def target(self) -> tuple[slice, ...]:
        """The box as an index into the shard."""
        return tuple(slice(a, a + n) for a, n in zip(self.at, self.size, strict=True))


def tensor_split(param: Param, layout: ParallelLayout, coords: Coordinates) -> tuple[int, int]:
    """Index and number of a parameter's shards; experts use expert tensor parallelism."""
    if param.tp_dim is None:
        return 0, 1
    return (coords.etp, layout.etp) if param.expert is not None else (coords.tp, layout.tp)


def local_shape(param: Param, shards: int) -> tuple[int, ...]:
    """Shape of one of `shards` tensor-parallel shards; vocabulary rows are rounded up, anything else must divide."""
    if param.tp_dim is None or shards == 1:
        return param.shape
    whole = param.shape[param.tp_dim]
    units = whole
    if param.join == Join.STACK:
        units = whole // len(param.parts)
    elif param.join == Join.QKV:
        units = param.kv_groups or 1
    if units % shards and not _is_vocabulary(param):
        what = "key-value groups" if param.join == Join.QKV else "rows" if param.tp_dim == 0 else "columns"
        raise BadInput(
            f"{param.name}: {units} {what} do not divide by a tensor parallel size of {shards}: use a smaller one"
        )
    shape = list(param.shape)
    shape[param.tp_dim] = -(-whole // shards)
    return tuple(shape)


@functools.lru_cache(maxsize=65536)
def pieces(param: Param, index: int = 0, shards: int = 1) -> tuple[Piece, ...]:
    """Pieces of shard `index` of `shards`, in shard order. Rows that pad the vocabulary belong to no piece."""
    shape = local_shape(param, shards)
    if param.tp_dim is None:
        index, shards = 0, 1
    if param.join == Join.SINGLE:
        return tuple(_single(param, shape, index))
    boxes = _stack(param, index, shards) if param.join == Join.STACK else _qkv(param, index, shards)
    found, row = [], 0
    for part, first, rows in boxes:
        rest = param.parts[part].shape[1:]
        zeros = (0,) * len(rest)
        found.append(Piece(part, (first, *zeros), (rows, *rest), (row, *zeros)))
        row += rows
    return tuple(found)


def needed_slices(param: Param, layout: ParallelLayout, coords: Coordinates) -> tuple[Piece, ...]:
    """Pieces a rank reads to fill its shard of a parameter that it holds."""
    return pieces(param, *tensor_split(param, layout, coords))


def holds(param: Param, config: ModelConfig, layout: ParallelLayout, coords: Coordinates) -> bool:
    """True if a rank holds the parameter or a shard of it, by pipeline stage and expert group."""
    if param.expert is not None:
        assert config.moe is not None
        if param.expert // (config.moe.num_experts // layout.ep) != coords.ep:
            return False
    if config.tie_word_embeddings and param.where == Where.EMBEDDING:
        # The output head of a tied model is a second copy of the embedding on the last stage.
        return coords.pp in (0, layout.pp - 1)
    return stage_of(param, layout, config.num_layers) == coords.pp


def check_layout(config: ModelConfig, layout: ParallelLayout) -> None:
    """Raise BadInput for a layout that the model does not allow, naming the size that does not divide."""
    heads, groups, moe = config.num_attention_heads, config.num_kv_heads, config.moe
    checks = [
        (heads, layout.tp, "attention heads", "--tensor-model-parallel-size"),
        (groups, layout.tp, "key-value heads", "--tensor-model-parallel-size"),
        (config.ffn_hidden_size, layout.tp, "columns of the dense MLP", "--tensor-model-parallel-size"),
    ]
    if config.mtp_layers:
        checks.append((config.hidden_size, layout.tp, "rows of the MTP projection", "--tensor-model-parallel-size"))
    if moe is not None:
        checks += [
            (moe.num_experts, layout.ep, "experts", "--expert-model-parallel-size"),
            (moe.ffn_hidden_size, layout.etp, "columns of an expert", "--expert-tensor-parallel-size"),
        ]
        if moe.shared_ffn_hidden_size:
            checks.append(
                (moe.shared_ffn_hidden_size, layout.tp, "columns of the shared expert", "--tensor-model-parallel-size")
            )
    elif layout.ep > 1 or layout.etp > 1:
        raise BadInput(
            f"EP{layout.ep} x ETP{layout.etp}: the model has no experts, leave --expert-model-parallel-size at 1"
        )
    for units, size, what, flag in checks:
        if units % size:
            raise BadInput(f"{units} {what} do not divide by {flag} {size}: use a divisor of {units}")
    layout.stage_layers(config.num_layers)


def _is_vocabulary(param: Param) -> bool:
    return param.where in (Where.EMBEDDING, Where.HEAD) and param.tp_dim == 0


def _single(param: Param, shape: tuple[int, ...], index: int) -> Iterator[Piece]:
    start = [0] * len(shape)
    size = list(shape)
    if param.tp_dim is not None:
        start[param.tp_dim] = index * shape[param.tp_dim]
        size[param.tp_dim] = min(shape[param.tp_dim], param.shape[param.tp_dim] - start[param.tp_dim])
        if size[param.tp_dim] <= 0:
            return
    yield Piece(0, tuple(start), tuple(size), (0,) * len(shape))


def _stack(param: Param, index: int, shards: int) -> Iterator[tuple[int, int, int]]:
    for part, tensor in enumerate(param.parts):
        rows = tensor.shape[0] // shards
        yield part, index * rows, rows


def _qkv(param: Param, index: int, shards: int) -> Iterator[tuple[int, int, int]]:
    assert param.kv_groups is not None
    local = param.kv_groups // shards
    for group in range(index * local, (index + 1) * local):
        for part, tensor in enumerate(param.parts):
            rows = tensor.shape[0] // param.kv_groups
            yield part, group * rows, rows
