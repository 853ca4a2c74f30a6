"""No option of the recipe is dead: changing it changes the plan or brings a note or a refusal; or code of a process
that runs later reads it. What the trainer makes of an option is shown in tests/megatron."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import Any

import pytest

import vime
from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.recipe.flags import recipe_options
from vime.recipe.schema import Recipe

ROOT = Path(vime.__file__).parent
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


def other_value(name: str, group: str, field: str) -> Any:
    """A value that differs from the default."""
    if name in OTHER:
        return OTHER[name]
    default = getattr(getattr(Recipe(name="r"), group), field)
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
def outcome(*flags: str) -> str:
    """Everything that a person and the stages see of a plan except the recipe itself, or the refusal."""
    try:
        plan = plan_of("tiny-deepseek-r1", *flags)
    except BadInput as error:
        return str(error)
    return plan.model_dump_json(exclude={"recipe"})


@functools.cache
def readers() -> dict[str, set[str]]:
    """Modules by the attributes that they read; the rules of the plan do not count."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name == "planning/derive.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                found.setdefault(node.attr, set()).add(name)
    return found


def spelled(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + name.replace("_", "-")]
    if isinstance(value, dict):
        return [flag, *(f"{key}={one}" for key, one in value.items())]
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


@pytest.mark.parametrize("name", sorted(recipe_options()))
def test_no_option_is_dead(name: str) -> None:
    target = recipe_options()[name]
    value = other_value(name, target.group, target.field)
    if value is not None and outcome(*spelled(name, value)) != outcome():
        return
    assert readers().get(name), f"{name}: neither the plan nor any later process looks at it"
