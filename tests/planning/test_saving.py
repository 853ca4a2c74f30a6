"""Time between checkpoints by Young's formula."""

import pytest

from tests.support.plans import plan_of
from vime.planning.saving import best_interval_seconds, failure_seconds, planned_interval_seconds
from vime.planning.show import render


def lost_share(interval: float, save: float, between_failures: float) -> float:
    """Share of the time that goes to saves and, on average half an interval a failure, to repeated work."""
    return save / interval + interval / 2 / between_failures


@pytest.mark.parametrize(("save", "between_failures"), [(10, 1e5), (300, 1.4e6), (900, 1e5)])
def test_no_other_interval_loses_less(save: float, between_failures: float) -> None:
    best = best_interval_seconds(save, between_failures)
    least = lost_share(best, save, between_failures)
    assert all(lost_share(best * factor, save, between_failures) > least for factor in (0.5, 0.9, 1.1, 2.0))


def test_more_gpus_fail_more_often() -> None:
    one, two = plan_of("deepseek-r1", nodes=16), plan_of("tiny-qwen3", nodes=1)
    assert failure_seconds(one) == pytest.approx(50_000 * 3600 / 128)
    assert failure_seconds(two) > failure_seconds(one)


def test_the_plan_states_the_formula() -> None:
    plan = plan_of("deepseek-r1", "--save-interval", "auto", nodes=16)
    text = next(line for line in render(plan).splitlines() if "checkpoints" in line)
    assert f"every {planned_interval_seconds(plan) / 3600:.1f} h at first: sqrt(2 x " in text
    assert "391 h between failures" in text
