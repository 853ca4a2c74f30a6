"""Dynamic sampling: filters that choose the finished groups that training gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from vime.errors import BadInput
from vime.samples import Group

TOLERANCE = 1e-9
"""Difference of two rewards, as a share of the larger where that is above 1, up to which they are equal."""


def check_reward_nonzero_std(group: Group) -> bool:
    """Keep groups whose rewards differ: equal ones give no advantage to learn from.

    Rewards are sums of floats, so 0.1 + 0.2 is equal to 0.3. One that is no number keeps its group, for the trainer to
    name it.
    """
    rewards = [math.nan if sample.reward is None else sample.reward for sample in group.samples]
    if not all(map(math.isfinite, rewards)):
        return len(rewards) > 1
    low, high = min(rewards, default=0.0), max(rewards, default=0.0)
    return high - low > TOLERANCE * max(1.0, abs(low), abs(high))


BUILT_IN: Mapping[str, Callable[[Group], bool]] = {"check_reward_nonzero_std": check_reward_nonzero_std}


def check_filter_path(path: str | None) -> None:
    """BadInput unless the path is a built-in name or `package.module:function`."""
    if path is not None and path not in BUILT_IN and ":" not in path:
        known = ", ".join(BUILT_IN)
        raise BadInput(f"--dynamic-sampling-filter-path {path} is unknown: give {known} or package.module:function")
