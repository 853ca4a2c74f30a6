"""Dynamic sampling: filters that choose the finished groups that training gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vime.errors import BadInput
from vime.samples import Group


def check_reward_nonzero_std(group: Group) -> bool:
    """True where the rewards differ; equal rewards give zero advantages and nothing to learn from."""
    return len({sample.reward for sample in group.samples}) > 1


BUILT_IN: Mapping[str, Callable[[Group], bool]] = {"check_reward_nonzero_std": check_reward_nonzero_std}


def check_filter_path(path: str | None) -> None:
    """BadInput unless the path is a built-in name or `package.module:function`."""
    if path is not None and path not in BUILT_IN and ":" not in path:
        known = ", ".join(BUILT_IN)
        raise BadInput(f"--dynamic-sampling-filter-path {path} is unknown: give {known} or package.module:function")
