"""Ways in which a recipe holds its conversations: a function, an environment, or the built-in tools."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vime.agents.environment import Environment, hold
from vime.errors import BadInput
from vime.rewards.worker import load
from vime.rollout.session import Session
from vime.samples import Sample

Function = Callable[[Session, Sample], Awaitable[None]]


@dataclass(frozen=True)
class Way:
    """A loaded way to hold a conversation; the same in the driver and in a worker process."""

    tools: Sequence[dict[str, Any]]
    """JSON schemas of tools that the prompts tell of."""
    goes_on: bool
    """Whether a conversation that was aborted without an environment's state can go on."""
    hold: Callable[[Session], Awaitable[None]]


def function_way(target: str) -> Way:
    """The function that `package.module:function` names: `async def generate(session, sample) -> None`.

    With an attribute `resumes = True` it is called for an aborted conversation too, and goes on from `session.turns`.
    Raises BadInput.
    """
    function: Function = load(target)
    if not inspect.iscoroutinefunction(function) or _too_few(function):
        raise BadInput(
            f"--custom-generate-function-path {target} is none of the kind: write async def generate(session, sample)"
        )

    async def held(session: Session) -> None:
        await function(session, session.sample)

    return Way((), bool(getattr(function, "resumes", False)), held)


def environment_way(target: str) -> Way:
    """The environment that `package.module:Class` names. Raises BadInput."""
    made: Any = load(target)
    if not (isinstance(made, type) and issubclass(made, Environment)):
        raise BadInput(
            f"--environment {target} is no class of vime.agents.environment.Environment: derive it from that"
        )
    kind: type[Environment] = made

    async def held(session: Session) -> None:
        await hold(session, kind())

    return Way(tuple(kind.tools), False, held)


def _too_few(function: Function) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return True
    return False
