"""Wall time by cause: every second belongs to one cause, and what was lost is named."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.observe.spent import ABOUT, LOST, USEFUL, Interval, attribute, bar, lost_share, spent
from vime.observe.timeline import Span

ORDER = ("a", "b", "c")
INTERVALS = st.lists(
    st.builds(
        lambda start, length, label: Interval(start, start + length, label),
        st.integers(0, 50), st.integers(0, 20), st.sampled_from(ORDER),
    ),
    max_size=12,
)  # fmt: skip


@given(INTERVALS)
def test_seconds_add_up_to_the_union_and_the_first_label_wins(intervals):
    totals = dict.fromkeys(ORDER, 0.0)
    for interval, seconds in attribute(intervals, ORDER):
        totals[interval.label] += seconds
    wanted = dict.fromkeys(ORDER, 0.0)
    for instant in range(80):
        active = [each.label for each in intervals if each.start <= instant < each.end]
        if active:
            wanted[min(active, key=ORDER.index)] += 1.0
    assert totals == pytest.approx(wanted)


def driver(*phases, track="driver"):
    return [Span(name, rollout, track, start, end) for name, rollout, start, end in phases]


def test_a_run_of_one_start():
    spans = driver(("start", -1, 10, 40), ("sync", 0, 40, 50), ("generate", 0, 50, 150), ("train", 0, 155, 200))
    spans += driver(("save", 0, 200, 220), ("sync", 1, 220, 230))
    steps = {0: {"rollout/tail_time": 30.0, "perf/sync_time": 10.0, "sync/time": 6.0, "handover/x_time": 7.0}}
    assert spent(spans, steps, [(0.0, 240.0)]) == pytest.approx(
        {
            "generating": 70, "training": 45, "longest answers": 30, "hand-over": 4 + 3, "weight sync": 10 + 6,
            "saving": 20, "starting": 40, "between phases": 15 - 3,
        }
    )  # fmt: skip


def test_generation_next_to_training_costs_nothing():
    spans = driver(("generate", 0, 0, 100), ("generate", 1, 100, 200), ("train", 0, 100, 180), ("train", 1, 200, 280))
    assert spent(spans, {}, [(0.0, None)]) == pytest.approx({"generating": 120, "training": 160})


def test_what_a_second_start_does_again_is_recovery_and_the_wait_for_it_the_queue():
    spans = driver(("generate", 0, 0, 50), ("train", 0, 50, 90), ("generate", 1, 90, 140))
    spans += driver(("start", -1, 310, 330), ("generate", 1, 340, 390), ("train", 1, 390, 430))
    found = spent(spans, {}, [(0.0, 150.0), (300.0, 430.0)])
    assert found == pytest.approx(
        {"generating": 100, "training": 80, "recovery": 50 + 40, "queue": 150, "between phases": 10}
    )


def test_an_engine_restart_inside_a_generation_is_recovery():
    spans = driver(("generate", 0, 0, 100), ("recover", 0, 20, 60), ("train", 0, 100, 150))
    assert spent(spans, {}, [(0.0, None)]) == pytest.approx({"generating": 60, "training": 50, "recovery": 40})


@st.composite
def runs(draw):
    """Some starts one after the other, with phases of rollouts that may be repeated, and any metrics."""
    now, spans, starts = 0.0, [], []
    for _ in range(draw(st.integers(1, 3))):
        began = now
        for rollout in range(draw(st.integers(0, 3))):
            for name in ("generate", "train", "sync", "save"):
                length = draw(st.floats(0, 50))
                spans.append(Span(name, rollout, "driver", now, now + length))
                now += length + draw(st.floats(0, 5))
        starts.append((began, now if draw(st.booleans()) else None))
        now += draw(st.floats(0, 100))
    names = ("rollout/tail_time", "perf/sync_time", "sync/time", "handover/a_time")
    steps = {rollout: {name: draw(st.floats(0, 100)) for name in names} for rollout in range(3)}
    return spans, steps, starts


@given(runs())
def test_causes_add_up_to_the_wall_time_and_none_is_negative(run):
    spans, steps, starts = run
    found = spent(spans, steps, starts)
    if not spans:
        assert found == {}
        return
    first = min([starts[0][0], *(span.start for span in spans)])
    last = max([starts[-1][0], *(span.end for span in spans), *(end for _, end in starts if end is not None)])
    assert math.isclose(sum(found.values()), last - first, abs_tol=1e-6)
    assert all(seconds > 0 for seconds in found.values())
    assert found.keys() <= {*USEFUL, *LOST}
    assert 0 <= lost_share(found) <= 1


def test_every_cause_is_explained_and_the_bar_says_it_in_words():
    assert ABOUT.keys() == {*USEFUL, *LOST}
    text = bar({"generating": 60.0, "saving": 40.0})
    assert 'aria-label="Wall time by cause: generating 60 %, saving 40 %"' in text
    assert bar({}) == ""
