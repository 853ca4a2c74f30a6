"""No option of the recipe is dead. Changing it changes the plan, an engine's command line, what engines sample with or
when the run saves and evaluates; or brings a note or a refusal; or changes what a real rank trains
(tests/megatron/test_options_train.py); or a test named here shows what it does."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest

from tests.support.plans import bound, plan_of
from tests.support.shown_options import SHOWN_IN
from tests.support.trained_options import TRAINED
from vime.errors import BadInput
from vime.recipe.flags import recipe_options
from vime.recipe.load import load_recipe
from vime.recipe.schema import Recipe
from vime.rollout.command import engine_command
from vime.run.trackers import wandb_settings
from vime.train.phases import evaluates_before, saves_after

NODES = {"tiny-deepseek-r1": 2, "deepseek-r1": 16}
"""Recipes that options are changed in, and their nodes."""
TESTS = Path(__file__).parents[1]
OTHER: dict[str, Any] = {
    "advantage_estimator": "gspo",
    "policy_loss_type": "cispo",
    "mismatch_correction": ["icepop"],
    "optimizer": None,
    "tis_clip_low": 0.5,
    "fetch": {"tiny-qwen3": "owner/name"},
    "model_args": {"moe_aux_loss_coeff": 0.1},
    "vllm": {"max_num_seqs": 7},
    "env": {"A": "b"},
}
"""Values of options whose type does not suggest another one; None: there is only one."""
SHOWN = {
    option: (file, function)
    for file, functions in SHOWN_IN.items()
    for function, options in functions.items()
    for option in options
}
"""File and function that show what an option does in a process that runs later."""


@functools.cache
def base(recipe: str) -> Recipe:
    return load_recipe(recipe, [])


def other_value(name: str, recipe: str, group: str, field: str) -> Any:
    """A value that differs from the recipe's."""
    if name in OTHER:
        return OTHER[name]
    default = getattr(getattr(base(recipe), group), field)
    annotation = str(type(getattr(Recipe(name="r"), group)).model_fields[field].annotation)
    if "Literal" in annotation:
        choices = [word.strip(" '") for word in annotation.split("Literal[")[1].split("]")[0].split(",")]
        return next(choice for choice in choices if choice != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    if "list[int]" in annotation:
        return [3]
    if "list" in annotation:
        return ["a", "/b"]
    return 2 if "int" in annotation else 0.5 if "float" in annotation else "other"


@functools.cache
def outcome(recipe_name: str, *flags: str) -> str:
    """Everything that a person, stages and engines see of a plan except the recipe itself, or the refusal."""
    try:
        plan = plan_of(recipe_name, *flags, nodes=NODES[recipe_name])
    except BadInput as error:
        return str(error)
    binding, recipe = bound(len(plan.nodes)), plan.recipe
    commands = [engine_command(plan, binding, engine, 0, [0]) for engine in plan.engines]
    rollouts = range(recipe.rollout.num_rollout)
    when = [(saves_after(recipe, n), evaluates_before(recipe, n)) for n in (*rollouts, len(rollouts))]
    seen = (commands, recipe.sampling, recipe.eval_sampling, recipe.rollout.steps, when, wandb_of(recipe))
    return plan.model_dump_json(exclude={"recipe"}) + repr(seen)


def wandb_of(recipe: Recipe) -> object:
    try:
        return wandb_settings(recipe, "run")
    except BadInput as error:
        return str(error)


@functools.cache
def functions_of(path: Path) -> dict[str, str]:
    """Source of a module's functions by name, with the module-level values before it."""
    text = path.read_text()
    return {
        node.name: ast.get_source_segment(text, node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def spelled(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + name.replace("_", "-")]
    if isinstance(value, dict):
        return [flag, *(f"{key}={one}" for key, one in value.items())]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def changes_what_is_planned(name: str) -> bool:
    """In the small recipe on processors, or in the large one on GPUs."""
    target = recipe_options()[name]
    for recipe in NODES:
        value = other_value(name, recipe, target.group, target.field)
        if value is not None and outcome(recipe, *spelled(name, value)) != outcome(recipe):
            return True
    return False


@pytest.mark.parametrize("name", sorted(recipe_options()))
def test_no_option_is_dead(name: str) -> None:
    if name in TRAINED or changes_what_is_planned(name):
        return
    assert name in SHOWN, f"{name}: it changes neither plan, commands nor training: name the test that shows its effect"
    file, function = SHOWN[name]
    body = functions_of(TESTS / file).get(function)
    assert body is not None, f"there is no {function} in tests/{file}"
    text = (TESTS / file).read_text()
    flag = "--" + name.replace("_", "-")
    assert name in text or flag in text, f"tests/{file} does not mention {name}"


def test_the_list_of_tests_holds_what_needs_it() -> None:
    """An option that the plan shows needs no entry; one that is gone has none."""
    assert [name for name in SHOWN if name not in recipe_options()] == []
    assert [name for name in SHOWN if name in TRAINED] == []
