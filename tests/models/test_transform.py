"""Joining, splitting and sharding weights undo each other, for any shape and layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import hf_configs
from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import HFTensor, Join, Param, Where
from vime.models.shards import check_layout, holds, local_shape, needed_slices, pieces
from vime.models.transform import join, shard, shard_parts, split, split_shards, unshard
from vime.recipe.parallel import ParallelLayout


@st.composite
def params_and_shards(draw) -> tuple[Param, int]:
    """A parameter of any kind, with odd sizes, and a tensor-parallel size that it allows."""
    shards, kind = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([*Join, "vocabulary", "replicated"]))
    unit, width = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    if kind == Join.STACK:
        parts = tuple(HFTensor(name, (unit * shards, width)) for name in ("gate", "up"))
        return Param("fc1", (2 * unit * shards, width), parts, Join.STACK, tp_dim=0), shards
    if kind == Join.QKV:
        groups, dim = shards * draw(st.integers(1, 3)), unit
        rows = {"q": groups * dim * draw(st.integers(1, 3)), "k": groups * dim, "v": groups * dim}
        parts = tuple(HFTensor(name, (n, width)) for name, n in rows.items())
        return Param("qkv", (sum(rows.values()), width), parts, Join.QKV, tp_dim=0, kv_groups=groups), shards
    if kind == "replicated":
        return Param("norm", (unit,), (HFTensor("n", (unit,)),)), shards
    if kind == "vocabulary":
        shape = (draw(st.integers(1, 40)), width)
        return Param("embedding", shape, (HFTensor("e", shape),), tp_dim=0, where=Where.EMBEDDING), shards
    dim = draw(st.sampled_from([0, 1]))
    shape = (unit * shards, width) if dim == 0 else (width, unit * shards)
    return Param("single", shape, (HFTensor("s", shape),), tp_dim=dim), shards


def example_parts(param: Param) -> dict[str, torch.Tensor]:
    """HF tensors whose elements are all different."""
    offset, parts = 1, {}
    for part in param.parts:
        count = torch.Size(part.shape).numel()
        parts[part.name] = torch.arange(offset, offset + count).reshape(part.shape)
        offset += count
    return parts


def all_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@settings(deadline=None)
@given(params_and_shards())
def test_split_undoes_join(case):
    param, _ = case
    parts = example_parts(param)
    whole = join(param, parts)
    assert whole.shape == param.shape
    assert sorted(whole.flatten().tolist()) == sorted(x for t in parts.values() for x in t.flatten().tolist())
    assert all_equal(split(param, whole), parts)


@settings(deadline=None)
@given(params_and_shards())
def test_unshard_undoes_shard(case):
    param, size = case
    layout = ParallelLayout(world_size=size, tp=size)
    ranks = [layout.coordinates(rank) for rank in range(size)]
    parts = example_parts(param)
    whole = join(param, parts)
    shards = [shard(param, whole, layout, coords) for coords in ranks]
    assert all(s.shape == local_shape(param, size) for s in shards)
    assert all(torch.equal(shard_parts(param, parts, layout, c), s) for c, s in zip(ranks, shards, strict=True))
    if param.tp_dim is None:
        assert all(torch.equal(s, whole) for s in shards)
        shards = shards[:1]
    assert torch.equal(unshard(param, shards), whole)
    assert all_equal(split_shards(param, shards), parts)


@settings(deadline=None)
@given(params_and_shards())
def test_ranks_need_every_element_exactly_once(case):
    param, size = case
    layout = ParallelLayout(world_size=size, tp=size)
    seen = {part.name: torch.zeros(part.shape, dtype=torch.int) for part in param.parts}
    for rank in range(size if param.tp_dim is not None else 1):
        for piece in needed_slices(param, layout, layout.coordinates(rank)):
            seen[param.parts[piece.part].name][piece.source] += 1
    assert all((count == 1).all() for count in seen.values())


def test_a_tensor_parallel_rank_has_its_gate_rows_over_its_up_rows():
    param = Param("fc1", (8, 1), (HFTensor("gate", (4, 1)), HFTensor("up", (4, 1))), Join.STACK, tp_dim=0)
    parts = {"gate": torch.tensor([[0], [1], [2], [3]]), "up": torch.tensor([[10], [11], [12], [13]])}
    layout = ParallelLayout(world_size=2, tp=2)
    assert shard_parts(param, parts, layout, layout.coordinates(1)).flatten().tolist() == [2, 3, 12, 13]


def test_queries_stand_with_their_key_value_group():
    sizes = {"q": 4, "k": 2, "v": 2}
    param = Param("qkv", (8, 1), tuple(HFTensor(n, (s, 1)) for n, s in sizes.items()), Join.QKV, tp_dim=0, kv_groups=2)
    parts = {name: torch.arange(size)[:, None] + 10 * i for i, (name, size) in enumerate(sizes.items())}
    assert join(param, parts).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_rows_that_pad_the_vocabulary_are_zero():
    param = Param("embedding", (5, 2), (HFTensor("e", (5, 2)),), tp_dim=0, where=Where.EMBEDDING)
    layout = ParallelLayout(world_size=2, tp=2)
    second = shard(param, torch.ones(5, 2), layout, layout.coordinates(1))
    assert second.tolist() == [[1, 1], [1, 1], [0, 0]]


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(1, 1, 1), (2, 1, 2), (1, 3, 4), (2, 3, 1), (4, 3, 8)]))
def test_all_ranks_together_hold_the_model_once_a_replica(sizes):
    tp, pp, ep = sizes
    hf = {**hf_configs.MOONLIGHT, "num_hidden_layers": 6, "n_routed_experts": 16, "num_nextn_predict_layers": 1}
    config = ModelConfig.from_hf(hf)
    layout = ParallelLayout(world_size=tp * pp * ep, tp=tp, pp=pp, ep=ep)
    check_layout(config, layout)
    ranks = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for param in params_of(config):
        replicas = [c for c in ranks if holds(param, config, layout, c)]
        expected = layout.edp * layout.etp if param.expert is not None else layout.world_size // layout.pp
        assert len(replicas) == expected, param.name


def test_a_tied_embedding_is_on_the_first_and_the_last_stage():
    config = ModelConfig.from_hf(hf_configs.QWEN3_4B)
    layout = ParallelLayout(world_size=4, pp=4)
    embedding = params_of(config)[0]
    assert [holds(embedding, config, layout, layout.coordinates(r)) for r in range(4)] == [True, False, False, True]


@pytest.mark.parametrize(
    ("hf", "layout", "told"),
    [
        (hf_configs.DEEPSEEK_R1, ParallelLayout(world_size=3, tp=3), "128 attention heads"),
        (hf_configs.DEEPSEEK_R1, ParallelLayout(world_size=3, ep=3), "256 experts"),
        (hf_configs.DEEPSEEK_R1, ParallelLayout(world_size=2, pp=2), "61 layers"),
        (hf_configs.QWEN3_4B, ParallelLayout(world_size=16, tp=16), "8 key-value heads"),
        (hf_configs.QWEN3_4B, ParallelLayout(world_size=2, ep=2), "no experts"),
    ],
)
def test_a_layout_that_the_model_does_not_allow_is_named(hf, layout, told):
    with pytest.raises(BadInput, match=told):
        check_layout(ModelConfig.from_hf(hf), layout)


def test_a_shard_that_does_not_divide_is_named():
    param = Param("fc2", (4, 6), (HFTensor("d", (4, 6)),), tp_dim=1)
    with pytest.raises(BadInput, match="fc2: 6 columns"):
        pieces(param, 0, 4)
