"""The built-in environment: the model calls tools until it answers without one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vime.agents import sandbox
from vime.agents.environment import Environment, Step, hold
from vime.agents.tools import Tool, ToolFailure, answer, arguments_of, make_tools
from vime.agents.ways import Way
from vime.recipe.schema import AgentOptions
from vime.rollout.chat import Message
from vime.rollout.session import Session

MOST_CALLS = 16
"""Calls of a turn that are answered; the others are told so."""


@dataclass(frozen=True)
class ToolSettings:
    """Tools by name, and what happens around a call."""

    tools: Mapping[str, Tool]
    seconds: float
    characters: int
    on_failure: Literal["observe", "fail"]

    @classmethod
    def of(cls, options: AgentOptions, programs: sandbox.Programs | None = None) -> ToolSettings:
        """From the recipe. Raises BadInput for a tool that is none."""
        # A character of a program's output has at most four bytes.
        limits = sandbox.Limits(options.tool_timeout, options.tool_memory, 4 * options.tool_output_characters)
        tools = make_tools(options.tools, limits, programs)
        return cls(tools, options.tool_timeout, options.tool_output_characters, options.on_tool_failure)


class FailedTool(Exception):
    """A tool failed, and the sample is to fail with it."""


class ToolEnvironment(Environment):
    """Answers the calls of each turn, all at once and in their order. Tools keep nothing, so it can always go on."""

    def __init__(self, settings: ToolSettings) -> None:
        self._settings = settings
        self.tools = [tool.schema for tool in settings.tools.values()]  # type: ignore[misc]

    async def step(self, message: Message) -> Step:
        calls = message.get("tool_calls") or []
        if not calls:
            return Step(done=True)
        texts = await asyncio.gather(*(self._answer(call) for call in calls[:MOST_CALLS]))
        texts += ["error: too many calls in one turn"] * (len(calls) - MOST_CALLS)
        answers = [_tool_message(call, text) for call, text in zip(calls, texts, strict=True)]
        return Step(answers)

    def state_dict(self) -> dict[str, Any]:
        return {}

    async def _answer(self, call: Mapping[str, Any]) -> str:
        """Text for the model. Raises FailedTool where a tool's failure is the sample's."""
        try:
            tool, arguments = arguments_of(call, self._settings.tools)
        except ToolFailure as failure:
            with self.session.tool("unknown" if failure.kind == "unknown" else _name(call)) as use:
                use.error = failure.kind
            return f"error: {failure}"
        with self.session.tool(tool.name) as use:
            try:
                # A little later than the sandbox's own limit, which tells what was written until then.
                text = await answer(tool, arguments, self._settings.seconds + 5.0)
            except ToolFailure as failure:
                use.error = failure.kind
                if self._settings.on_failure == "fail":
                    raise FailedTool(f"the tool {tool.name} failed: {failure.kind}") from failure
                text = f"error: {failure}"
        return shortened(text, self._settings.characters)


def tools_way(options: AgentOptions, programs: sandbox.Programs | None = None) -> Way:
    """The way of `--environment tools`. Raises BadInput for a tool that is none."""
    settings = ToolSettings.of(options, programs)

    async def held(session: Session) -> None:
        await hold(session, ToolEnvironment(settings))

    return Way([tool.schema for tool in settings.tools.values()], True, held)


def shortened(text: str, most: int) -> str:
    """The text, or its beginning and end with a word on what is missing between."""
    if len(text) <= most:
        return text
    left = f"\n[{len(text) - most} characters left out]\n"
    return text[: most - most // 4] + left + text[len(text) - most // 4 :]


def _name(call: Mapping[str, Any]) -> str:
    return str((call.get("function") or {}).get("name"))


def _tool_message(call: Mapping[str, Any], text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call.get("id"), "name": _name(call), "content": text}
