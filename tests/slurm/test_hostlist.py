"""Slurm's lists of hosts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.errors import SchedulerError
from vime.slurm.hostlist import expand_hosts


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("login1", ("login1",)),
        ("gpu[001-003]", ("gpu001", "gpu002", "gpu003")),
        ("gpu[9-11]", ("gpu9", "gpu10", "gpu11")),
        ("gpu[08,10-11],cpu7", ("gpu08", "gpu10", "gpu11", "cpu7")),
        ("r[1-2]n[01-02]", ("r1n01", "r1n02", "r2n01", "r2n02")),
        ("dgx-[1-2].hpc.example.org", ("dgx-1.hpc.example.org", "dgx-2.hpc.example.org")),
    ],
)
def test_a_list_is_expanded_in_its_order(text: str, names: tuple[str, ...]) -> None:
    assert expand_hosts(text) == names


@pytest.mark.parametrize("text", ["gpu[1-2", "gpu[a-b]", "gpu[]"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(SchedulerError, match="is not a list of hosts"):
        expand_hosts(text)


@given(st.lists(st.tuples(st.sampled_from(["gpu", "r2-", "n"]), st.integers(0, 9999)), unique=True))
def test_names_without_brackets_come_back(parts: list[tuple[str, int]]) -> None:
    names = tuple(f"{name}{number:04d}" for name, number in parts)
    assert expand_hosts(",".join(names)) == names


@given(st.integers(0, 500), st.integers(0, 40), st.integers(1, 4))
def test_a_range_keeps_its_width(first: int, more: int, width: int) -> None:
    names = expand_hosts(f"n[{first:0{width}d}-{first + more:0{width}d}]")
    assert names == tuple(f"n{number:0{width}d}" for number in range(first, first + more + 1))
