"""The agent that a recipe names."""

from __future__ import annotations

from typing import Any, Protocol, Self

from vime.agents.local import LocalAgent
from vime.agents.processes import ProcessAgent
from vime.agents.sandbox import Here, Programs
from vime.agents.tool_environment import tools_way
from vime.agents.ways import environment_way, function_way
from vime.planning.plugins import TOOLS_ENVIRONMENT
from vime.recipe.schema import Recipe
from vime.rollout.session import Agent


class AgentHost(Agent, Protocol):
    """An agent that has processes or folders of its own: a context manager."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *error: Any) -> None: ...


def agent_of(recipe: Recipe, programs: Programs | None = None) -> AgentHost | None:
    """The agent of `--custom-generate-function-path` or `--environment`; None for answers of one turn.

    `programs`: where those of the tool `python` run, on this node by default.
    """
    options = recipe.agent
    if options.environment == TOOLS_ENVIRONMENT:
        where = (programs or Here()) if options.runs_python else None
        return LocalAgent(tools_way(options, where), programs=where)
    kind = "function" if options.custom_generate_function_path else "environment"
    target = options.custom_generate_function_path or options.environment
    if target is None:
        return None
    if options.agent_processes == 0:
        return LocalAgent((function_way if kind == "function" else environment_way)(target))
    return ProcessAgent(kind, target, options.agent_processes)
