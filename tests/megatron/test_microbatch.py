"""Micro-batches predict every response token exactly once, whatever the packing, padding and context parallelism."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.errors import DataError
from vime.megatron.attention_layout import build_groups, local_positions
from vime.megatron.microbatch import Padding, RolloutTokens, make_batch, optimizer_steps
from vime.recipe.parallel import ParallelLayout

CPU = torch.device("cpu")
PAIRS = st.lists(
    st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=9), st.lists(st.integers(0, 99), max_size=20)),
    min_size=1,
    max_size=8,
)
SIZES = st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (1, 4)])


@settings(deadline=None)
@given(PAIRS, SIZES)
def test_every_response_token_is_predicted_once_from_the_token_before_it(
    pairs: list[tuple[list[int], list[int]]], sizes: tuple[int, int]
) -> None:
    tp, cp = sizes
    layout = ParallelLayout(world_size=tp * cp, tp=tp, cp=cp, sequence_parallel=tp > 1)
    data = RolloutTokens.of(pairs)
    found: dict[int, tuple[int, int, int]] = {}
    for rank in range(cp):
        batch = make_batch(
            data, range(len(pairs)), Padding.of(layout), cp_rank=rank, cp_size=cp, device=CPU
        )  # fmt: skip
        assert batch.tokens.shape[1] % tp == 0
        for token, position, target, index in zip(
            batch.tokens[0].tolist(), batch.positions[0].tolist(), batch.targets.tolist(),
            batch.response_index.tolist(),
            strict=True,
        ):  # fmt: skip
            if index >= 0:
                assert index not in found
                found[index] = (token, position, target)
    expected, index = {}, 0
    for prompt, response in pairs:
        whole = [*prompt, *response]
        for place in range(len(prompt), len(whole)):
            expected[index] = (whole[place - 1], place - 1, whole[place])
            index += 1
    assert found == expected


@given(PAIRS, SIZES)
def test_context_parallel_ranks_hold_equal_parts_and_the_whole_together(
    pairs: list[tuple[list[int], list[int]]], sizes: tuple[int, int]
) -> None:
    tp, cp = sizes
    padding = Padding.of(ParallelLayout(world_size=tp * cp, tp=tp, cp=cp))
    data = RolloutTokens.of(pairs)
    batches = [make_batch(data, range(len(pairs)), padding, cp_rank=r, cp_size=cp, device=CPU) for r in range(cp)]
    assert len({batch.tokens.shape[1] for batch in batches}) == 1
    assert sum(batch.tokens.shape[1] for batch in batches) == int(batches[0].bounds[-1])


@settings(deadline=None)
@given(PAIRS, st.sampled_from([1, 2, 4]))
def test_attention_sees_the_sequence_up_to_the_query_and_no_other(
    pairs: list[tuple[list[int], list[int]]], cp: int
) -> None:
    data, padding = RolloutTokens.of(pairs), Padding.of(ParallelLayout(world_size=cp, cp=cp))
    bounds = make_batch(data, range(len(pairs)), padding, cp_rank=0, cp_size=cp, device=CPU).bounds
    lengths = bounds.diff().tolist()
    local = sum(lengths) // cp
    # (sequence, position) of every token, in the order of the ranks.
    owner = [
        (number, position)
        for rank in range(cp)
        for number, length in enumerate(lengths)
        for position in local_positions(length, rank, cp).tolist()
    ]
    for rank in range(cp):
        seen_queries = []
        for group in build_groups(lengths, rank, cp, CPU):
            mask = group.mask
            for row in range(group.queries.shape[0]):
                for column in range(group.queries.shape[1]):
                    if not group.real[row, column]:
                        continue
                    query = int(group.queries[row, column])
                    seen_queries.append(query)
                    number, position = owner[rank * local + query]
                    visible = range(column + 1) if mask is None else mask[row, 0, column].nonzero().squeeze(1).tolist()
                    assert {owner[int(group.keys[row, k])] for k in visible} == {
                        (number, p) for p in range(position + 1)
                    }
        assert sorted(seen_queries) == list(range(local))


def test_a_micro_batch_without_samples_predicts_nothing() -> None:
    padding = Padding.of(ParallelLayout(world_size=4, tp=2, cp=2))
    batch = make_batch(RolloutTokens.of([([1], [2])]), [], padding, cp_rank=1, cp_size=2, device=CPU)
    assert batch.response_index.max() == -1
    assert batch.tokens.shape[1] > 0


def test_columns_are_picked_at_the_targets_and_zero_elsewhere() -> None:
    data = RolloutTokens.of([([7, 8], [1, 2, 3]), ([9], []), ([5], [4])])
    batch = make_batch(data, [2, 0], Padding(), cp_rank=0, cp_size=1, device=CPU)
    column = torch.tensor([10.0, 20.0, 30.0, 40.0])
    assert batch.column(column).tolist() == [40.0, 0.0, 0.0, 10.0, 20.0, 30.0, 0.0]
    assert data.trained == [0, 2]


def test_an_empty_prompt_and_a_sequence_beyond_the_position_limit_are_named() -> None:
    with pytest.raises(DataError, match="sample 1 has an empty prompt"):
        RolloutTokens.of([([1], [2]), ([], [3])])
    with pytest.raises(DataError, match="sample 0 has 4 tokens, more than the model's 3 positions"):
        RolloutTokens.of([([1, 2], [3, 4])], longest=3)


@given(st.integers(1, 500), st.integers(1, 20))
def test_optimizer_steps_take_every_sample_once_in_equal_parts(samples: int, steps: int) -> None:
    parts = optimizer_steps(samples, steps)
    assert np.concatenate([np.asarray(part) for part in parts]).tolist() == list(range(samples))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(a.stop == b.start for a, b in pairwise(parts))
