"""When a run saves and evaluates."""

from tests.support.plans import plan_of
from vime.planning.saving import best_interval_seconds, failure_seconds, planned_interval_seconds
from vime.recipe.schema import CheckpointOptions, EvalOptions, Recipe, RolloutOptions
from vime.train.phases import evaluates_before, saves_after
from vime.train.saves import SaveSchedule


def recipe(num_rollout=10, save=None, evaluate=None, sets=("aime", "x.jsonl")):
    return Recipe(
        name="r",
        rollout=RolloutOptions(num_rollout=num_rollout),
        checkpoint=CheckpointOptions(save_interval=save),
        eval=EvalOptions(eval_interval=evaluate, eval_prompt_data=list(sets)),
    )


def test_saves_every_interval_and_after_the_last_rollout():
    assert [i for i in range(10) if saves_after(recipe(save=4), i)] == [3, 7, 9]
    assert [i for i in range(10) if saves_after(recipe(), i)] == [9]


def test_evaluates_before_training_every_interval_and_at_the_end():
    assert [i for i in range(11) if evaluates_before(recipe(evaluate=4), i)] == [0, 4, 8, 10]


def test_without_interval_or_sets_there_is_no_evaluation():
    assert not any(evaluates_before(recipe(), i) for i in range(11))
    assert not any(evaluates_before(recipe(evaluate=4, sets=()), i) for i in range(11))


def test_saves_by_time_follow_the_measured_save():
    now = [0.0]
    plan = plan_of("tiny-qwen3", "--save-interval", "auto", "--num-rollout", "1000")
    schedule = SaveSchedule(plan, lambda: now[0])
    now[0] = planned_interval_seconds(plan) * 0.99
    assert not schedule.due(0)
    now[0] = planned_interval_seconds(plan)
    assert schedule.due(1)
    schedule.saved(40.0)
    interval = best_interval_seconds(40.0, failure_seconds(plan))
    now[0] += interval * 0.99
    assert not schedule.due(2)
    assert schedule.due(999)
    now[0] += interval * 0.02
    assert schedule.due(3)


def test_saves_by_rollouts_know_no_time():
    schedule = SaveSchedule(plan_of("tiny-qwen3", "--save-interval", "4", "--num-rollout", "10"), lambda: 1e9)
    assert [i for i in range(10) if schedule.due(i)] == [3, 7, 9]
