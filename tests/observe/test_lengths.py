"""Lengths by reward: every sample is counted once, in its bin and its class."""

from hypothesis import given
from hypothesis import strategies as st

from vime.observe.lengths import LENGTHS_FILE, append_lengths, figures, histogram, read_lengths, reward_classes
from vime.samples import Group, Rollout, Sample

SCORED = st.lists(st.tuples(st.integers(0, 40_000), st.floats(-5, 5, width=16)), max_size=200)


def rollout(number, *scored):
    samples = [
        Sample(i, 0, "p", [1], response_ids=[7] * tokens, reward=reward) for i, (tokens, reward) in enumerate(scored)
    ]
    return Rollout(number, [Group(0, samples)])


@given(SCORED)
def test_every_sample_is_counted_once(scored):
    longest = max((tokens for tokens, _ in scored), default=0) + 1
    counts = histogram(scored, longest, bins=10)
    assert sum(map(sum, counts)) == len(scored)
    classes = reward_classes([reward for _, reward in scored])
    assert len(counts) == len(classes) <= 4
    for row, (_, holds) in zip(counts, classes, strict=True):
        assert sum(row) == sum(holds(reward) for _, reward in scored)


def test_few_distinct_rewards_are_classes_of_their_own():
    assert [name for name, _ in reward_classes([0.0, 1.0, 1.0, 0.5])] == ["reward 0", "reward 0.5", "reward 1"]
    assert len(reward_classes([i / 10 for i in range(11)])) == 3


def test_what_was_written_is_read_and_a_repeated_rollout_counts_once(tmp_path):
    for number in range(50):
        append_lengths(tmp_path, rollout(number, (number + 1, 0.0), (3, 1.0)))
    append_lengths(tmp_path, rollout(49, (9, 0.5)))
    found = read_lengths(tmp_path, 20)
    assert found is not None
    assert found.first_ids == (0, 19)
    assert found.newest_ids == (30, 49)
    assert found.newest[-1] == (9, 0.5)
    assert len(found.first) == 40
    assert len(found.newest) == 39
    assert (tmp_path / LENGTHS_FILE).stat().st_mode & 0o777 == 0o600


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    append_lengths(tmp_path, rollout(0, (3, 1.0)))
    with (tmp_path / LENGTHS_FILE).open("a") as file:
        file.write('{"rollout_id":1,"tokens":[1')
    found = read_lengths(tmp_path)
    assert found is not None
    assert found.newest == [(3, 1.0)]


def test_the_figures_say_their_numbers_in_words(tmp_path):
    append_lengths(tmp_path, rollout(0, (100, 0.0), (300, 0.0), (50, 1.0)))
    text = figures(read_lengths(tmp_path))
    assert "reward 0: 2 samples of 200 tokens; reward 1: 1 samples of 50 tokens" in text
    assert text.count("<figure") == 1
    assert figures(None) == ""
