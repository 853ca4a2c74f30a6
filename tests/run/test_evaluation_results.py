"""Points of evaluations beside a run reach its metrics whoever writes them, and only those of the branch that lives."""

from __future__ import annotations

import stat
import time

import pytest

from tests.support.evaluated import ended, evaluated
from vime.run.evaluations import (
    evaluation_folder,
    is_taken,
    left_out,
    mark_taken,
    read_results,
    why_left_out,
)
from vime.run.journal import Journal, read_events
from vime.run.metrics import MetricsWriter, read_metrics, series
from vime.system.private import private_folder


def test_a_result_is_a_point_of_its_rollout_without_the_runs_writer(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(3):
        writer.write(step, {"train/loss": 1.0})
    writer.close()
    evaluated(tmp_path, 1, 0.5)
    steps = read_metrics(tmp_path)
    assert series(steps, "eval/aime") == [(1, 0.5)]
    assert set(steps[1]) == {"time", "train/loss", "eval/aime"}


def test_a_point_of_weights_from_a_dead_branch_is_not_read(tmp_path):
    evaluated(tmp_path, 5, 0.9, weights_time=time.time() - 60)
    evaluated(tmp_path, 2, 0.4, weights_time=time.time() - 60)
    writer = MetricsWriter(tmp_path)
    writer.start(3)
    assert series(read_metrics(tmp_path), "eval/aime") == [(2, 0.4)]
    evaluated(tmp_path, 5, 0.7, weights_time=time.time() + 1)
    assert series(read_metrics(tmp_path), "eval/aime") == [(2, 0.4), (5, 0.7)]
    writer.close()


def test_a_new_result_is_new_to_the_trackers(tmp_path):
    folder = evaluated(tmp_path, 1, 0.5)
    assert not is_taken(folder)
    mark_taken(folder)
    assert is_taken(folder)
    evaluated(tmp_path, 1, 0.6)
    assert not is_taken(folder)


def test_damaged_and_foreign_files_are_no_results(tmp_path):
    folder = evaluated(tmp_path, 1, 0.5)
    (folder / "result.json").write_text('{"rollout_id": 1, "val')
    (tmp_path / "evaluations" / "notes").mkdir()
    assert read_results(tmp_path) == []
    (folder / "result.json").write_text('{"other": 1}')
    assert read_results(tmp_path) == []


def test_results_are_private(tmp_path):
    folder = evaluated(tmp_path, 1, 0.5)
    assert stat.S_IMODE((folder / "result.json").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"cause": "CRASH"}, "CRASH: an engine died"),
        ({"cause": "NODE_FAILURE", "requeued": True}, None),
        ({"cause": "SUCCESS"}, None),
    ],
)
def test_an_evaluation_that_ended_without_a_result_says_why(tmp_path, data, why):
    assert why_left_out(ended(evaluation_folder(tmp_path, 3), **data)) == why


def test_an_evaluation_that_has_not_ended_is_not_left_out(tmp_path):
    private_folder(tmp_path / "evaluations")
    assert why_left_out(private_folder(evaluation_folder(tmp_path, 3))) is None


def test_evaluations_without_a_point_are_listed_until_they_have_one(tmp_path):
    journal = Journal(tmp_path)
    for number, fails in ((1, True), (2, True), (2, False), (4, False)):
        data = {"rollout_id": number, **({"left_out": True} if fails else {})}
        journal.write("evaluation", f"rollout {number} is left out: no disk", data=data)
    journal.close()
    ended(evaluation_folder(tmp_path, 4), cause="CRASH")
    texts = ["rollout 1 is left out: no disk", "rollout 4 is left out: CRASH: an engine died"]
    assert list(left_out(tmp_path, read_events(tmp_path)).values()) == texts
    evaluated(tmp_path, 1, 0.5)
    assert list(left_out(tmp_path, read_events(tmp_path))) == [4]
