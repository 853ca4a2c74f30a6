"""A recipe from its YAML file and the flags given on the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from vime.errors import BadInput
from vime.recipe import files
from vime.recipe.flags import collect, flag, parse_flags, read_mapping
from vime.recipe.prompt_sources import evaluation_sources, with_paths
from vime.recipe.schema import Recipe

_BASE_DIR = re.compile(r"\$(?:BASE_DIR\b|\{BASE_DIR\})")
_CHECKPOINT_PATHS = ("hf_checkpoint", "ref_load", "load", "start_from", "save", "save_hf")


@dataclass(frozen=True)
class Loaded:
    """A recipe, and what a person should know about the way it was read."""

    recipe: Recipe
    notes: tuple[str, ...]


def load_recipe(name_or_path: str, flags: Sequence[str] = ()) -> Recipe:
    """The recipe of `load_with_notes`."""
    return load_with_notes(name_or_path, flags).recipe


def load_with_notes(name_or_path: str, flags: Sequence[str] = ()) -> Loaded:
    """The recipe of a name in `configs/recipes/` (or of a YAML file) with `flags` on top; paths as written.

    Raises BadInput for an unknown recipe or option, or a value of the wrong type.
    """
    path = files.find("recipes", name_or_path)
    values: dict[str, Any] = {}
    try:
        notes = collect(read_mapping(files.read(path)), values)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    given = list(parse_flags(flags))
    notes += collect(given, values)
    notes += _settle_dispatcher([name for name, _ in given], values.get("misc", {}))
    try:
        return Loaded(Recipe(name=path.stem, **values), tuple(notes))
    except ValidationError as error:
        raise BadInput(first_problem(error)) from error


def load_flags(name: str, flags: Sequence[str]) -> Loaded:
    """A recipe of flags alone, with the defaults of vime for all others. Raises BadInput as `load_with_notes`."""
    values: dict[str, Any] = {}
    given = list(parse_flags(flags))
    notes = collect(given, values)
    notes += _settle_dispatcher([option for option, _ in given], values.get("misc", {}))
    try:
        return Loaded(Recipe(name=name, **values), tuple(notes))
    except ValidationError as error:
        raise BadInput(first_problem(error)) from error


def with_flags(recipe: Recipe, flags: Sequence[str]) -> Recipe:
    """The recipe with these flags on top. Raises BadInput as `load_with_notes`."""
    values: dict[str, Any] = {}
    for group in Recipe.model_fields.keys() - {"name"}:
        options = getattr(recipe, group)
        values[group] = {name: getattr(options, name) for name in options.model_fields_set}
    collect(parse_flags(flags), values)
    try:
        return Recipe(name=recipe.name, **values)
    except ValidationError as error:
        raise BadInput(first_problem(error)) from error


def as_yaml(recipe: Recipe) -> str:
    """The recipe's file: one `option: value` for every option that was given."""
    lines: dict[str, Any] = {}
    for group in Recipe.model_fields:
        if group == "name":
            continue
        options = getattr(recipe, group)
        for name in sorted(options.model_fields_set):
            value = getattr(options, name)
            if (group, name) == ("engine", "vllm"):
                lines |= {f"vllm-{key.replace('_', '-')}": each for key, each in value.items()}
            elif (group, name) == ("model", "model_args"):
                lines |= {key.replace("_", "-"): each for key, each in value.items()}
            else:
                lines[name.replace("_", "-")] = value
    return yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def _settle_dispatcher(given: Sequence[str], misc: dict[str, Any]) -> list[str]:
    """Resolves DeepEP against another dispatcher: the later wins, and a flag is later than the recipe's file."""
    deepep, dispatcher = "moe_enable_deepep", "moe_token_dispatcher_type"
    kind = misc.get(dispatcher, "flex")
    if not misc.get(deepep) or kind == "flex" or not {deepep, dispatcher} & set(given):
        return []
    last = max((number, name) for number, name in enumerate(given) if name in (deepep, dispatcher))[1]
    if last == dispatcher:
        misc[deepep] = False
        return [f"--moe-token-dispatcher-type {kind} is later than --moe-enable-deepep and wins: DeepEP is off"]
    misc[dispatcher] = "flex"
    return [f"--moe-enable-deepep is later than --moe-token-dispatcher-type {kind} and wins: the dispatcher is flex"]


def first_problem(error: ValidationError) -> str:
    """One line about the first value that does not fit, under its flag's name."""
    problem = error.errors(include_url=False)[0]
    place = [str(part) for part in problem["loc"]]
    name = flag(place[1]) if len(place) > 1 else flag(place[0]) if place else "recipe"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    said = problem["msg"].removeprefix("Value error, ")
    return f"{name} is {problem['input']!r}: {said[:1].lower()}{said[1:]}{more}"


def change(recipe: Recipe, **groups: dict[str, Any]) -> Recipe:
    """A copy with fields of its groups replaced: `change(recipe, resources={"colocate": True})`."""
    return recipe.model_copy(
        update={group: getattr(recipe, group).model_copy(update=fields) for group, fields in groups.items()}
    )


def absolute_path(text: str, base_dir: str | None) -> str:
    """The path with `$BASE_DIR` and a leading `~` replaced, absolute; without a base folder `$BASE_DIR` stays."""
    if base_dir is not None:
        text = _BASE_DIR.sub(lambda _: base_dir, text)
    elif _BASE_DIR.search(text):
        return text
    return os.path.abspath(os.path.expanduser(text))


def uses_base_dir(recipe: Recipe) -> str | None:
    """The first option whose path needs `$BASE_DIR`, as its flag; None when none does."""
    found: list[str] = []

    def look(name: str, text: str) -> str:
        if _BASE_DIR.search(text):
            found.append(name)
        return text

    _map_paths(recipe, look)
    return flag(found[0]) if found else None


def with_absolute_paths(recipe: Recipe, base_dir: str | None) -> Recipe:
    """The recipe with every path absolute and `$BASE_DIR` replaced (also in `--env`)."""
    return _map_paths(recipe, lambda _, text: absolute_path(text, base_dir))


def _map_paths(recipe: Recipe, convert: Callable[[str, str], str]) -> Recipe:
    """Applies `convert(option, path)` to every path of the recipe."""
    checkpoint = {
        name: convert(name, value) for name in _CHECKPOINT_PATHS if (value := getattr(recipe.checkpoint, name))
    }
    training = with_paths(recipe.rollout.prompt_data, lambda path: convert("prompt_data", path))
    rollout = {"prompt_data": training} if training else {}
    evaluation = [
        text
        for source in evaluation_sources(recipe.eval.eval_prompt_data)
        for text in (source.name, convert("eval_prompt_data", source.path))
    ]
    misc = (
        {"load_debug_rollout_data": convert("load_debug_rollout_data", path)}
        if (path := recipe.misc.load_debug_rollout_data)
        else {}
    )
    teacher = {"opd_teacher": convert("opd_teacher", path)} if (path := recipe.teacher.opd_teacher) else {}
    env = {key: convert("env", value) if _BASE_DIR.search(value) else value for key, value in recipe.misc.env.items()}
    return change(
        recipe,
        checkpoint=checkpoint,
        rollout=rollout,
        eval={"eval_prompt_data": evaluation},
        teacher=teacher,
        misc={**misc, "env": env},
    )


def bf16_folder(recipe: Recipe) -> str:
    """Where the cast stage writes the bf16 copy of `--hf-checkpoint`: the folder next to it, named `…-bf16`."""
    if recipe.checkpoint.hf_checkpoint is None:
        raise BadInput("--hf-checkpoint is not set: give the folder of the HF checkpoint")
    return recipe.checkpoint.hf_checkpoint.rstrip("/") + "-bf16"
