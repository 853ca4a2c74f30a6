"""Packing: every sample once, never over capacity, few bins, the same number of even micro-batches on every rank."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.megatron.packing import Cost, fixed_micro_batches, micro_batches, pack

LENGTHS = st.lists(st.integers(1, 3000), min_size=1, max_size=400)


@given(LENGTHS, st.integers(1, 4000))
def test_every_sample_is_packed_once_and_only_long_ones_exceed_the_capacity(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    for members in bins:
        assert sum(lengths[i] for i in members) <= capacity or len(members) == 1


@given(LENGTHS)
def test_no_two_bins_could_be_one(lengths):
    """Any-fit bound: at most one bin is half empty or less, so there are fewer than twice the ideal."""
    bins = pack(lengths, 3000)
    loads = sorted(sum(lengths[i] for i in members) for members in bins)
    assert len(bins) == 1 or loads[0] + loads[1] > 3000


@pytest.mark.parametrize("seed", range(3))
def test_bins_are_nearly_ideal_for_many_samples(seed):
    import numpy as np

    random = np.random.default_rng(seed)
    lengths = random.integers(500, 32_769, 1024).tolist()
    assert len(pack(lengths, 65_536)) <= 1.005 * math.ceil(sum(lengths) / 65_536)


@given(LENGTHS, st.integers(1, 6), st.integers(1, 3))
def test_every_rank_has_the_same_number_of_micro_batches(lengths, ranks, multiple):
    shares = micro_batches(lengths, 4000, ranks, multiple_of=multiple)
    counts = {len(share) for share in shares}
    assert len(shares) == ranks
    assert len(counts) == 1
    assert counts.pop() % multiple == 0
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))


@given(st.lists(st.integers(100, 3000), min_size=64, max_size=300), st.integers(2, 4))
def test_ranks_differ_by_less_than_one_micro_batch_in_cost(lengths, ranks):
    cost = Cost()
    shares = micro_batches(lengths, 4000, ranks)
    loads = [sum(cost(lengths[i]) for batch in share for i in batch) for share in shares]
    largest = max(sum(cost(lengths[i]) for i in batch) for share in shares for batch in share)
    assert max(loads) - min(loads) <= largest * 1.01


def test_costly_micro_batches_come_first_on_a_rank():
    cost = Cost()
    for share in micro_batches([3000, 10, 2000, 500, 2500, 900], 3000, 2):
        costs = [sum(cost((3000, 10, 2000, 500, 2500, 900)[i]) for i in batch) for batch in share]
        assert costs == sorted(costs, reverse=True)


def test_packing_is_deterministic():
    lengths = [7 * i % 997 + 1 for i in range(500)]
    assert pack(lengths, 2048) == pack(lengths, 2048)


@given(LENGTHS, st.integers(1, 7), st.integers(1, 4))
def test_without_dynamic_batching_a_micro_batch_counts_samples(lengths, size, ranks):
    shares = fixed_micro_batches(lengths, size, ranks)
    assert all(len(batch) <= size for share in shares for batch in share)
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1


def test_a_capacity_below_one_is_an_error():
    with pytest.raises(ValueError, match="capacity 0"):
        pack([1], 0)
