"""A rollout that derails training is undone once, and its prompts do not come again."""

import json

import pytest

from tests.support.plans import plan_of
from vime.errors import Cause, DataError
from vime.run.left_out import LEFT_OUT, leave_out, left_out
from vime.run.metrics import MetricsWriter
from vime.train.spike_guard import Spike, SpikeGuard

USUAL = {"train/grad_norm": 1.0, "rollout/raw_reward": 0.5}
SPIKE = {**USUAL, "train/grad_norm": 300.0}


def guard(run_dir, *flags, first=20):
    plan = plan_of("tiny-qwen3", *flags).model_copy(update={"run_dir": str(run_dir)})
    return SpikeGuard(plan, first)


@pytest.fixture
def trained(tmp_path):
    """A run folder with twenty rollouts, and a spike after them that a set-back undoes."""
    writer = MetricsWriter(str(tmp_path))
    for rollout_id in range(20):
        writer.write(rollout_id, USUAL)
    writer.write(20, SPIKE)
    writer.close()
    return tmp_path


def test_a_spike_ends_the_attempt_and_leaves_its_prompts_out(trained):
    with pytest.raises(
        Spike, match=r"rollout 20 spiked: train/grad_norm is 300, .* its 2 prompts are left out"
    ) as error:
        guard(trained, "--spike-guard", "rollback").judge(20, SPIKE, [("math", 3), ("math", 1)])
    assert error.value.cause is Cause.SPIKE
    assert Cause.SPIKE.requeue_mends
    assert left_out(trained) == {("math", 1), ("math", 3)}
    assert (trained / LEFT_OUT).stat().st_mode & 0o777 == 0o600


def test_after_the_limit_a_spike_is_printed_and_kept(trained, capsys):
    leave_out(trained, 7, "earlier", [("math", 0)])
    guard(trained, "--spike-guard", "rollback", "--spike-limit", "1").judge(20, SPIKE, [("math", 3)])
    assert "warning: rollout 20: train/grad_norm is 300" in capsys.readouterr().out
    assert left_out(trained) == {("math", 0)}


@pytest.mark.parametrize("mode", ["none", "skip"])
def test_only_the_rollback_looks_at_rollouts(trained, mode):
    guard(trained, "--spike-guard", mode).judge(20, SPIKE, [("math", 3)])
    assert left_out(trained) == frozenset()


def test_what_is_usual_comes_from_the_rollouts_before_this_start(trained):
    guard(trained, "--spike-guard", "rollback").judge(20, USUAL, [])
    guard(trained, "--spike-guard", "rollback", first=3).judge(3, SPIKE, [])


def test_a_damaged_list_of_prompts_is_named(tmp_path):
    (tmp_path / LEFT_OUT).write_text(json.dumps([])[:1])
    with pytest.raises(DataError, match=LEFT_OUT):
        left_out(tmp_path)
