"""A run that was set back to an earlier checkpoint: the report shows the samples and checkpoints that live."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.plans import plan_of
from vime.observe.summary import read_run
from vime.run.folder import write_plan
from vime.run.metrics import MetricsWriter


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Eight rollouts with samples, then a start that goes on from rollout 3 and has trained rollouts 3 and 4."""
    write_plan(plan_of("tiny-qwen3", nodes=1, run_dir=tmp_path))
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for first, last in ((0, 8), (3, 5)):
        writer = MetricsWriter(tmp_path)
        writer.start(first)
        for rollout in range(first, last):
            sample = {"index": 0, "group": 0, "prompt": "1+1", "response": f"start {first}", "reward": 1.0}
            (folder / f"{rollout:06d}.jsonl").write_text(json.dumps(sample) + "\n")
            writer.write(rollout, {"rollout/raw_reward": 0.5})
        writer.close()
    for rollout in (1, 2, 5, 7):
        (tmp_path / "checkpoints" / f"iter_{rollout:07d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    return tmp_path


def test_samples_of_the_branch_that_died_are_not_shown(run: Path) -> None:
    found = read_run(run, []).samples
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert [found[rollout][0]["response"] for rollout in range(5)] == ["start 0"] * 3 + ["start 3"] * 2


def test_nor_are_its_checkpoints(run: Path) -> None:
    plan = read_run(run, []).plan
    assert plan.recipe.checkpoint.save is None or plan.recipe.checkpoint.save.startswith(str(run))
    assert [each.rollout_id for each in read_run(run, []).checkpoints] == [1, 2]
