"""The first screen's three answers follow from metrics, and are not more certain than these."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.observe.verdict import FEWEST, Verdict, health, learning, panel, speed, trend

DRAW = random.Random(0)


def steps(name, values):
    return {number: {name: value} for number, value in enumerate(values)}


def rewards(first, last, count=60, noise=0.02):
    return [first + (last - first) * i / (count - 1) + DRAW.gauss(0, noise) for i in range(count)]


@pytest.mark.parametrize(
    ("values", "kind", "begins"),
    [
        (rewards(0.3, 0.7), "good", "Yes: the mean reward rose"),
        (rewards(0.7, 0.3), "bad", "No: the mean reward fell"),
        (rewards(0.5, 0.5), "warn", "Not visibly"),
        ([0.3, 0.5, 0.7], "unknown", "Too early to say: 3 rollouts."),
        ([], "unknown", "Too early to say: 0 rollouts."),
    ],
)
def test_learning_is_a_reward_that_rises_beyond_its_noise(values, kind, begins):
    found = learning(steps("rollout/raw_reward", values))
    assert found.kind == kind
    assert found.answer.startswith(begins)


@given(st.lists(st.floats(-1e3, 1e3), max_size=300))
def test_a_trend_turns_around_with_its_series(values):
    found, back = trend(values), trend(values[::-1])
    assert (found is None) == (len(values) < FEWEST)
    if found is not None and back is not None:
        assert (found.first, found.last) == pytest.approx((back.last, back.first))
        assert found.errors == pytest.approx(-back.errors)


def test_constant_rewards_have_no_trend():
    found = trend([1.0] * 50)
    assert found is not None
    assert found.errors == 0


def test_evidence_stands_with_the_answer():
    found = learning({0: {"eval/aime": 0.4, "eval/aime/pass@8": 0.6}, 9: {"eval/aime": 0.55, "train/entropy": 0.3}})
    assert found.evidence == (("eval/aime", "0.4 → 0.55"), ("entropy", "0.3"))


def test_a_run_that_loses_time_says_to_what():
    found = speed({}, {"generating": 30.0, "training": 20.0, "longest answers": 40.0, "saving": 10.0})
    assert found.kind == "warn"
    assert "50 % of the time" in found.answer
    assert "the largest loss is longest answers, 40 %" in found.answer


def test_a_run_that_becomes_slower_says_so():
    slower = steps("perf/tokens_per_gpu_per_s", [200 + DRAW.gauss(0, 3) for _ in range(20)] + [100.0] * 20)
    found = speed(slower, {"generating": 90.0, "saving": 10.0})
    assert found.kind == "warn"
    assert found.answer.startswith("It became slower: tokens/s/GPU fell from ")


def test_nothing_measured_is_no_answer():
    assert speed({}, {}).kind == "unknown"
    assert health({}, 0).kind == "unknown"


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"train/train_rollout_logprob_abs_diff": 0.3}, "trainer and engines differ by 0.3 nat, above 0.1"),
        ({"train/skipped_steps": 2.0}, "2 skipped optimizer steps"),
        ({"sync/engine_restarts": 1.0}, "1 engine restarts"),
        ({"rollout/truncated_share": 0.5}, "50 % of the responses were cut"),
        ({"rollout/reward_failures": 3.0}, "3 failed rewards"),
    ],
)
def test_every_sign_of_trouble_is_named(metrics, says):
    quiet = {"train/skipped_steps": 0.0, "sync/engine_restarts": 0.0, "train/train_rollout_logprob_abs_diff": 0.01}
    assert health({0: quiet}, 1).kind == "good"
    found = health({0: {**quiet, **metrics}}, 1)
    assert found.kind == "warn"
    assert says in found.answer


def test_a_failed_run_is_not_healthy_whatever_its_metrics():
    found = health({0: {"train/skipped_steps": 0.0}}, 1, "out of memory")
    assert found.kind == "bad"
    assert found.answer == "No: it ended with out of memory."
    assert health({}, 1, "deadline").kind == "bad"


def test_the_panel_is_escaped():
    text = panel([Verdict("q", "good", "<b>", (("<i>", "&"),))])
    assert "&lt;b&gt;" in text
    assert "<i>" not in text
