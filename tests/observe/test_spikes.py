"""Spikes are found, and ordinary noise is none."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from vime.observe.spikes import FEWEST, GRAD_NORM, SIGNALS, SpikeWatch, Window

FACTOR = 10.0
USUAL = {
    "train/grad_norm": 0.8,
    "train/loss": 0.002,
    "train/train_rollout_logprob_abs_diff": 0.01,
    "rollout/raw_reward": 0.5,
}


def watched(rollouts: int = 20, **change: float) -> SpikeWatch:
    watch, noise = SpikeWatch(FACTOR), random.Random(0)
    for _ in range(rollouts):
        assert watch.add({name: value * noise.uniform(0.7, 1.3) for name, value in USUAL.items()}) == ""
    return watch


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train/grad_norm", 40.0),
        ("train/loss", 1.0),
        ("train/train_rollout_logprob_abs_diff", 0.5),
        ("rollout/raw_reward", -0.9),
        ("train/grad_norm", float("nan")),
        ("train/grad_norm", float("inf")),
    ],
)
def test_a_spike_of_each_signal_is_named(name: str, value: float) -> None:
    assert watched().add({**USUAL, name: value}).startswith(f"{name} is ")


@pytest.mark.parametrize("name", USUAL)
def test_a_jump_in_the_good_direction_is_none(name: str) -> None:
    better = {"rollout/raw_reward": 1.0, "train/loss": -1.0}.get(name, 0.0)
    assert watched().add({**USUAL, name: better}) == ""


def test_a_spike_does_not_move_what_later_values_are_compared_with() -> None:
    watch = watched()
    for _ in range(50):
        assert watch.add({**USUAL, "train/grad_norm": 40.0})
    assert watch.add(USUAL) == ""


@given(some.lists(some.floats(0, 1e6), max_size=FEWEST - 1), some.floats(0, 1e9))
def test_nothing_spikes_before_there_is_something_to_compare_with(values: list[float], value: float) -> None:
    window = Window(GRAD_NORM)
    window.values.extend(values)
    assert window.spreads(value) == 0.0


@given(some.sampled_from(SIGNALS), some.lists(some.floats(-1e6, 1e6), min_size=FEWEST, max_size=40))
def test_the_median_itself_is_never_a_spike(signal, values: list[float]) -> None:
    window = Window(signal)
    window.values.extend(values)
    middle = sorted(window.values)[len(window.values) // 2]
    assert window.spreads(middle) <= 1.0


def test_signals_that_are_not_measured_are_passed_over() -> None:
    watch = SpikeWatch(FACTOR)
    assert all(watch.add({"rollout/raw_reward": 0.5}) == "" for _ in range(20))
