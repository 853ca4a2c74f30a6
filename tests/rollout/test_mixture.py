"""Several prompt sets as one stream: shares hold, settled prompts wait, a resumed run takes the very next ones."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.errors import DataError
from vime.rollout.data import PromptSet, PromptStream
from vime.rollout.mixture import PromptMixture
from vime.samples import Prompt

SIZES = st.dictionaries(st.sampled_from(("a", "b", "c")), st.integers(1, 12), min_size=1)


def mixture(sizes, weights=None, seed=1, **options):
    streams = {
        name: PromptStream(PromptSet(name, tuple(Prompt(i, "", [1], None, {}) for i in range(rows))), True, seed)
        for name, rows in sizes.items()
    }
    return PromptMixture(streams, weights or dict.fromkeys(sizes, 1.0), **options)


def taken(mixed, count):
    return [(name, prompt.number) for name, prompt in mixed.take(count)]


def visit(mixed, count):
    """Take prompts and reward them by a rule, as training would; what was taken."""
    names = taken(mixed, count)
    for name, number in names:
        mixed.record(name, number, [1.0, 1.0] if number % 3 == 0 else [0.0, 1.0])
    return names


@given(SIZES, st.lists(st.sampled_from((1.0, 2.0, 0.5, 7.0)), min_size=3, max_size=3), st.integers(1, 80))
def test_every_set_has_its_share_to_within_one(sizes, weights, count):
    shares = dict(zip(sizes, weights, strict=False))
    names = [name for name, _ in taken(mixture(sizes, shares), count)]
    for name, weight in shares.items():
        assert abs(names.count(name) - count * weight / sum(shares.values())) <= max(1, len(sizes) - 1)


@given(SIZES, st.integers(0, 60), st.integers(0, 60), st.integers(0, 3))
def test_a_resumed_mixture_takes_the_very_next_prompts(sizes, before, after, skips):
    weights = {name: 1.0 + place for place, name in enumerate(sizes)}
    whole = mixture(sizes, weights, skip_settled=skips)
    visit(whole, before)
    resumed = mixture(sizes, weights, skip_settled=skips)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert visit(resumed, after) == visit(whole, after)


def test_a_settled_prompt_misses_as_many_turns_as_asked_for_and_is_counted():
    mixed = mixture({"a": 4}, skip_settled=2)
    for name, number in taken(mixed, 4):
        mixed.record(name, number, [1.0, 1.0] if number == 2 else [0.0, 1.0])
    assert sorted(taken(mixed, 6)) == sorted([("a", 0), ("a", 1), ("a", 3)] * 2)
    assert mixed.take_metrics()["rollout/prompts_skipped"] == 2
    assert ("a", 2) in taken(mixed, 4)


def test_prompts_that_are_all_settled_come_again():
    mixed = mixture({"a": 3}, skip_settled=5)
    for _ in range(3):
        for name, number in taken(mixed, 3):
            mixed.record(name, number, [0.0, 0.0])
    assert mixed.take_metrics()["rollout/prompts_skipped"] > 0


def test_a_curriculum_weighs_prompts_by_their_rewards():
    mixed = mixture({"a": 50}, remembers=True)
    visit(mixed, 50)
    histories = mixed.histories()
    assert [(each.set, each.number) for each in histories] == [("a", number) for number in range(50)]
    mixed.set_chances([0.0 if each.rewards[-1] == 1.0 else 1.0 for each in histories])
    assert all(number % 3 for _, number in taken(mixed, 66))
    mixed.set_chances([0.5] * 50)
    mixed.take_metrics()
    assert len(taken(mixed, 200)) == 200
    assert 100 < mixed.take_metrics()["rollout/prompts_left_out"] < 300


@pytest.mark.parametrize("chances", [[1.0], [2.0, 1.0, 1.0], [float("nan"), 1.0, 1.0]])
def test_a_curriculum_that_gives_something_else_is_named(chances):
    mixed = mixture({"a": 3}, remembers=True)
    visit(mixed, 3)
    with pytest.raises(DataError, match="a number from 0 to 1 for each of 3 prompts"):
        mixed.set_chances(chances)


def test_a_curriculum_that_leaves_out_everything_ends_the_run_instead_of_hanging():
    mixed = mixture({"a": 3}, remembers=True)
    visit(mixed, 3)
    mixed.set_chances([0.0] * 3)
    with pytest.raises(DataError, match="leaves out every prompt of the set a"):
        mixed.take(1)


def test_a_cursor_of_one_set_of_an_older_version_is_taken_over():
    stream = mixture({"a": 9})._streams["a"]
    stream.take(4)
    resumed = mixture({"a": 9})
    resumed.load_state_dict(stream.state_dict())
    assert [number for _, number in taken(resumed, 5)] == [prompt.number for prompt in stream.take(5)]


def test_a_cursor_of_other_sets_is_refused_and_other_weights_hold_from_here_on():
    state = mixture({"a": 5, "b": 5}).state_dict()
    with pytest.raises(DataError, match="the prompt sets a, b, but this run has a, c"):
        mixture({"a": 5, "c": 5}).load_state_dict(state)
    mixed = mixture({"a": 5, "b": 5})
    visit(mixed, 8)
    other = mixture({"a": 5, "b": 5}, {"a": 3.0, "b": 1.0})
    other.load_state_dict(mixed.state_dict())
    assert [name for name, _ in taken(other, 8)].count("a") == 6


@given(SIZES, st.integers(1, 40))
def test_rows_that_are_left_out_never_come(sizes, count):
    out = {(name, 0) for name, rows in sizes.items() if rows > 1}
    assert not out & set(taken(mixture(sizes, left_out=out), count))


def test_a_set_of_which_all_is_left_out_ends_in_an_error():
    with pytest.raises(DataError, match="leaves out every prompt of the set a"):
        mixture({"a": 2}, left_out={("a", 0), ("a", 1)}).take(1)
