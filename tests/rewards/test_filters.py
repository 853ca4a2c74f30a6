"""Groups that dynamic sampling keeps."""

from __future__ import annotations

import math

import pytest

from vime.rewards.filters import check_reward_nonzero_std
from vime.samples import Group, Sample


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ([0.1 + 0.2, 0.3, 0.3], False),
        ([0.3, 0.3 + 1e-6], True),
        ([1e9, 1e9 + 1e-3], False),
        ([0.0, -0.0], False),
        ([-1.0, 1.0], True),
        ([1.0], False),
        ([math.nan, 1.0], True),
        ([None, 1.0], True),
    ],
)
def test_a_group_is_kept_where_its_rewards_differ(rewards: list[float | None], kept: bool) -> None:
    samples = [Sample(number, 0, "", [1], reward=reward) for number, reward in enumerate(rewards)]
    assert check_reward_nonzero_std(Group(0, samples)) == kept
