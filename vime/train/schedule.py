"""When a run saves and evaluates: pure functions of the rollout's number."""

from __future__ import annotations

from vime.recipe.schema import Recipe


def saves_after(recipe: Recipe, rollout_id: int) -> bool:
    """Every `--save-interval` rollouts, and after the last one."""
    last = rollout_id == recipe.rollout.num_rollout - 1
    interval = recipe.checkpoint.save_interval
    return last or (interval is not None and (rollout_id + 1) % interval == 0)


def evaluates_before(recipe: Recipe, rollout_id: int) -> bool:
    """Before the first rollout and every `--eval-interval` rollouts; `num_rollout` stands for the end of the run."""
    interval = recipe.eval.eval_interval
    if interval is None or not recipe.eval.eval_prompt_data:
        return False
    return rollout_id % interval == 0 or rollout_id == recipe.rollout.num_rollout
