"""When a run saves and evaluates."""

from vime.recipe.schema import CheckpointOptions, EvalOptions, Recipe, RolloutOptions
from vime.train.phases import evaluates_before, saves_after


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
