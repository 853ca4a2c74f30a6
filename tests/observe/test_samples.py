"""Rollouts on disk: what a debug run writes, another one trains on."""

import pytest

from vime.errors import BadInput
from vime.observe.samples import read_rollout, read_samples, write_samples
from vime.samples import Group, Rollout, Sample, Status


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
