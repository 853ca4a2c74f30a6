"""Checks of reward, filter and loss names before anything is queued; plug-ins are parsed, not imported."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import urlsplit

from vime.errors import BadInput
from vime.recipe import neighbours
from vime.recipe.schema import Recipe
from vime.rewards.names import BUILT_IN, GROUP_PREFIX, REMOTE

FILTERS = ("check_reward_nonzero_std",)
"""Built-in filters (`vime.rewards.filters`)."""
TOOLS_ENVIRONMENT = "tools"
TOOLS = ("calculator", "python")
"""Built-in tools (`vime.agents.tools`)."""


def check_plugins(recipe: Recipe, *, required: bool) -> list[str]:
    """Check the reward, the filter and every `package.module:function` of a recipe. Raises BadInput.

    A module that is not found here is an error if the job runs in this environment (`required`), otherwise a note.
    """
    notes = []
    # The job's processes get the recipe's environment, so its PYTHONPATH counts as the caller's does.
    folders = [folder for folder in recipe.misc.env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    for option, target in _targets(recipe):
        missing = check_target(option, target, folders)
        if missing and required:
            raise BadInput(f"{missing}: run from the folder that has it, set PYTHONPATH, or correct the name")
        if missing:
            notes.append(f"{missing}; a submission from here would be refused")
    return notes


def plugin_targets(recipe: Recipe) -> tuple[tuple[str, str], ...]:
    """(option, `package.module:function`) of every plug-in, each once. Raises BadInput as `check_plugins` does."""
    return tuple(dict.fromkeys(_targets(recipe)))


def _targets(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(option, `module:function`) of every plug-in. Raises BadInput for a name that is neither that nor built in."""
    algorithm, rollout = recipe.algorithm, recipe.rollout
    if algorithm.loss_type == "policy_loss" and not recipe.misc.load_debug_rollout_data:
        yield from _reward(recipe)
        path = rollout.dynamic_sampling_filter_path
        if path is not None and path not in FILTERS:
            yield "--dynamic-sampling-filter-path", _named("--dynamic-sampling-filter-path", path, FILTERS, _FILTERS)
        yield from _agent(recipe)
    named = {
        "--advantage-estimator": [algorithm.advantage_estimator],
        "--policy-loss-type": [algorithm.policy_loss_type or ""],
        "--mismatch-correction": algorithm.mismatch_correction,
        "--curriculum": [rollout.curriculum or ""],
    }
    for option, values in named.items():
        yield from ((option, value) for value in values if ":" in value)


_FILTERS, _REWARDS = neighbours.FILTERS, neighbours.REWARDS


def _reward(recipe: Recipe) -> Iterator[tuple[str, str]]:
    name, known = recipe.rollout.rm_type, (*BUILT_IN, REMOTE)
    if name is None and not recipe.needs_reward:
        return
    if name is None:
        raise BadInput(f"--rm-type is not set: give one of {', '.join(known)}, or package.module:function")
    if name == REMOTE:
        _check_address(recipe.rollout.rm_url)
    elif name not in BUILT_IN:
        yield "--rm-type", _named("--rm-type", name.removeprefix(GROUP_PREFIX), known, _REWARDS)


def _agent(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Holder of conversations. Raises BadInput for options that contradict one another."""
    agent, function = recipe.agent, "--custom-generate-function-path"
    if agent.custom_generate_function_path and agent.environment:
        raise BadInput(f"{function} and --environment both hold the conversations: give one of them")
    if agent.custom_generate_function_path:
        yield function, _named(function, agent.custom_generate_function_path, (), {})
    if agent.environment and agent.environment != TOOLS_ENVIRONMENT:
        yield "--environment", _named("--environment", agent.environment, (TOOLS_ENVIRONMENT,), {})
    if agent.environment != TOOLS_ENVIRONMENT:
        return
    _check_tools(recipe)
    for tool in agent.tools:
        if tool not in TOOLS:
            yield "--tools", _named("--tools", tool, TOOLS, {})


def _check_tools(recipe: Recipe) -> None:
    if not recipe.agent.tools:
        raise BadInput(f"--environment {TOOLS_ENVIRONMENT} needs --tools: give some of {', '.join(TOOLS)}")
    if not recipe.rollout.apply_chat_template:
        raise BadInput("--tools needs --apply-chat-template: the template tells the model of its tools")
    if not (recipe.engine.vllm.get("tool_call_parser") and recipe.engine.vllm.get("enable_auto_tool_choice")):
        raise BadInput(
            "--tools needs --vllm-enable-auto-tool-choice and --vllm-tool-call-parser NAME, vLLM's parser of the "
            "model's calls: hermes for Qwen3, deepseek_v3 for DeepSeek-R1"
        )


def _check_address(url: str | None) -> None:
    if not url:
        raise BadInput("--rm-type remote needs --rm-url, the address of the reward server")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise BadInput(f"--rm-url is {url!r}: give an address such as http://host:8000/score")


def _named(option: str, value: str, known: Sequence[str], elsewhere: dict[str, str]) -> str:
    """The value if it is `module:function`; else raises BadInput with vime's name for it."""
    module, colon, function = value.partition(":")
    if colon:
        if all(part.isidentifier() for part in (*module.split("."), function)):
            return value
        raise BadInput(f"{option} is {value!r}: write package.module:function")
    if value in elsewhere:
        hint = f"here it is {elsewhere[value]}"
    elif plug_in := neighbours.plug_in(value):
        hint = f"a function is written {plug_in}"
    else:
        hint = f"give one of {', '.join(known)}, or package.module:function"
    raise BadInput(f"{option} {value} is unknown: {hint}")


def check_target(option: str, target: str, folders: Sequence[str] = ()) -> str | None:
    """A sentence if the module is found neither here nor in `folders`, else None. Raises BadInput if it lacks the
    function."""
    module, _, function = target.partition(":")
    file = _source(module, folders)
    if file is None:
        return f"{option} {target}: there is no module {module} here"
    if file.suffix != ".py":
        return None
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise BadInput(f"{option} {target}: {file} cannot be read as Python ({error}): correct it") from error
    defined = set(_defined(tree))
    if "*" not in defined and function not in defined:
        raise BadInput(f"{option} {target}: {file} defines no {function}: correct the name")
    return None


def _source(module: str, folders: Sequence[str]) -> Path | None:
    """File of a module, found part by part without importing a package."""
    path: Sequence[str] | None = [os.getcwd(), *folders, *sys.path]
    spec = None
    parts = module.split(".")
    for number in range(len(parts)):
        if path is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[: number + 1]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin else None


def _defined(tree: ast.Module) -> Iterator[str]:
    """Names that a module's top level defines or imports, including in `if` and `try`; `*` for a star import."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif not isinstance(node, ast.expr) or isinstance(node, ast.Tuple | ast.List):
            pending.extend(ast.iter_child_nodes(node))
