"""Rollouts on disk: what a debug run writes, another one trains on."""

from collections import Counter

import pytest

from vime.errors import BadInput
from vime.observe.samples import read_rollout, read_samples, write_samples
from vime.samples import Group, Rollout, Sample, Status, ToolUse, Turn


def rollout():
    def sample(index, group):
        return Sample(
            index,
            group,
            [{"role": "user", "content": "1+1="}],
            [1, 2, 3],
            label="2",
            metadata={"level": 3},
            response_ids=[4, 0],
            log_probs=[-0.5, -0.25],
            weight_versions=[3, 4],
            loss_mask=[0, 1],
            response="2",
            reward=1.0,
            status=Status.TRUNCATED,
        )

    return Rollout(4, [Group(7, [sample(14, 7), sample(15, 7)]), Group(9, [sample(18, 9), sample(19, 9)])])


def test_a_saved_rollout_is_read_back_with_everything_that_training_looks_at(tmp_path):
    write_samples(tmp_path, rollout(), everything=True)
    assert read_rollout(tmp_path / "rollouts", 4) == rollout()


def test_a_report_reads_prompts_as_text(tmp_path):
    rows = read_samples(write_samples(tmp_path, rollout(), everything=True))
    assert [row["prompt"] for row in rows] == ["user: 1+1="] * 4
    assert rows[0]["tokens"] == 2


def test_a_rollout_of_a_version_that_kept_less_is_refused_in_one_line(tmp_path):
    path = write_samples(tmp_path, rollout(), everything=True)
    path.write_text(path.read_text().replace('"metadata"', '"other"'))
    with pytest.raises(BadInput, match="no 'metadata'"):
        read_rollout(tmp_path / "rollouts", 4)


def test_what_was_written_for_a_report_is_not_taken_for_a_rollout(tmp_path):
    write_samples(tmp_path, rollout())
    with pytest.raises(BadInput, match="--save-debug-rollout-data"):
        read_rollout(tmp_path / "rollouts", 4)


def test_a_missing_rollout_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"000005\.jsonl"):
        read_rollout(tmp_path, 5)


def conversation():
    """One sample of three turns with a branch, as it comes to training."""
    whole = rollout()
    sample = whole.samples[0]
    sample.response_ids, sample.loss_mask = [4, 0, 9, 4, 0], [1, 1, 0, 1, 1]
    sample.log_probs, sample.weight_versions = [-0.5, -0.25, 0.0, -0.5, -0.25], [3, 3, -1, 4, 4]
    sample.turns = [
        Turn("model", 0, 2, "call", "stop"),
        Turn("tool", 2, 3, "<b>2</b>"),
        Turn("model", 3, 5, "2", "stop"),
    ]
    sample.tools = [ToolUse("add", 0.5, "timeout")]
    sample.branches = [
        Sample(14, 7, "aside", [1], response_ids=[5], loss_mask=[1], branch=1, turns=[Turn("model", 0, 1)])
    ]
    return Rollout(4, [group.with_branches() for group in whole.groups])


def test_a_conversation_is_read_back_with_its_turns_and_branches(tmp_path):
    whole = conversation()
    write_samples(tmp_path, whole, everything=True)
    again = read_rollout(tmp_path / "rollouts", 4)
    assert [sample.values() for sample in again.samples] == [sample.values() for sample in whole.samples]
    assert [(s.index, s.branch, s.reward) for s in again.groups[0].samples] == [
        (14, 0, 1.0),
        (14, 1, 1.0),
        (15, 0, 1.0),
    ]


def test_a_report_gets_a_conversation_turn_by_turn(tmp_path):
    rows = read_samples(write_samples(tmp_path, conversation()))
    (row,) = [row for row in rows if row["turns"]]
    assert [(turn["role"], turn["text"], turn["tokens"]) for turn in row["turns"]] == [
        ("model", "call", 2),
        ("tool", "<b>2</b>", 1),
        ("model", "2", 2),
    ]


def test_what_only_looks_like_turns_is_damage_and_not_shown(tmp_path):
    path = write_samples(tmp_path, conversation())
    path.write_text(path.read_text().replace('"role": "tool"', '"who": "tool"'))
    damage = Counter()
    rows = read_samples(path, damage=damage)
    assert not [row for row in rows if row["turns"]]
    assert damage["000004.jsonl"] == 1
