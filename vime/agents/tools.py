"""Tools that a model may call: a calculator, Python in a sandbox, and functions of one's own."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
import json
import math
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vime.agents import sandbox
from vime.errors import BadInput
from vime.rewards.worker import load

MOST_CHARACTERS = 1000
"""Characters of an expression for the calculator."""
MOST_BITS = 4096
"""Bits of a whole number that the calculator takes or makes."""
MOST_WAIT_SECONDS = 600.0
"""Longest wait of a program for room on a node, and for another node where its own is lost."""


class ToolFailure(Exception):
    """A tool did not answer; `kind` names how in the metrics, the text is for the model."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Tool:
    """A tool: what the model is told of it, and the function that answers its arguments with text."""

    name: str
    schema: dict[str, Any]
    call: Callable[..., Awaitable[str]]
    waits: float = 0.0
    """Seconds that a call may wait for room before its time begins."""


def make_tools(
    names: Sequence[str], limits: sandbox.Limits, programs: sandbox.Programs | None = None
) -> dict[str, Tool]:
    """Tools by name: built-in ones and functions as `package.module:function`; `programs`: those of `python`.

    Raises BadInput.
    """
    where = programs or sandbox.Here()
    made = {"calculator": lambda: _calculator_tool(), "python": lambda: _python_tool(limits, where)}
    tools: dict[str, Tool] = {}
    for name in names:
        tool = made[name]() if name in made else _own_tool(name)
        if tool.name in tools:
            raise BadInput(f"--tools has two of the name {tool.name}: rename one")
        tools[tool.name] = tool
    return tools


async def answer(tool: Tool, arguments: Mapping[str, Any], limit_s: float) -> str:
    """The tool's answer. Raises ToolFailure, also after `limit_s` seconds and for whatever it raises."""
    limit_s += tool.waits
    try:
        async with asyncio.timeout(limit_s):
            return await tool.call(**arguments)
    except ToolFailure:
        raise
    except TimeoutError:
        raise ToolFailure("timeout", f"no answer within {limit_s:g} seconds") from None
    except Exception as error:
        raise ToolFailure(type(error).__name__, f"{type(error).__name__}: {error}") from error


def _function(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _calculator_tool() -> Tool:
    async def call(expression: str) -> str:
        try:
            return calculate(expression)
        except ValueError as error:
            raise ToolFailure("expression", str(error)) from error

    text = "Computes an arithmetic expression."
    return Tool("calculator", _function("calculator", text, "expression", "such as 3*(4+5)"), call)


def _python_tool(limits: sandbox.Limits, programs: sandbox.Programs) -> Tool:
    async def call(code: str) -> str:
        outcome = await programs.run(code, limits)
        if outcome.failure == "lost":
            raise ToolFailure("lost", "the program was lost with the sandbox or node that ran it")
        if outcome.failure == "timeout":
            raise ToolFailure("timeout", f"{outcome.output}\n[ended after {limits.seconds:g} seconds]".lstrip())
        if outcome.failure == "flood":
            raise ToolFailure("flood", f"{outcome.output}\n[ended: more than {limits.output} bytes of output]")
        # A program that raises has answered: its traceback tells the model what is wrong.
        return outcome.output or (f"[{outcome.failure}]" if outcome.failure else "[no output]")

    text = "Runs a Python program and returns what it prints. Nothing is kept between two programs."
    return Tool("python", _function("python", text, "code", "the program"), call, MOST_WAIT_SECONDS)


def _own_tool(target: str) -> Tool:
    """A function with type hints and a docstring that describes its arguments (`Args:`): they become the schema."""
    from transformers.utils import get_json_schema

    function = load(target)
    try:
        schema = get_json_schema(function)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"--tools {target} has no type hints or docstring to tell the model of: {line}") from error

    async def call(**arguments: Any) -> str:
        if inspect.iscoroutinefunction(function):
            return str(await function(**arguments))
        return str(await asyncio.to_thread(functools.partial(function, **arguments)))

    return Tool(schema["function"]["name"], schema, call)


_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(expression: str) -> str:
    """Value of an arithmetic expression of numbers, `+ - * / // % ** ^` and brackets. Raises ValueError."""
    if not isinstance(expression, str) or len(expression) > MOST_CHARACTERS:
        raise ValueError(f"the expression has to be text of at most {MOST_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("this is no arithmetic expression") from error
    except ZeroDivisionError as error:
        raise ValueError("division by zero") from error
    except OverflowError as error:
        raise ValueError("the number is too large") from error
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and isinstance(right, int):
            _check_power(left, right)
        return _bounded(_OPERATORS[type(node.op)](left, right))
    raise ValueError("only numbers, + - * / // % ** and brackets are allowed")


def _check_power(base: int, exponent: int) -> None:
    if abs(base) > 1 and exponent * math.log2(abs(base)) > MOST_BITS:
        raise ValueError("the number is too large")


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the value is not a real number")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError("the number is too large")
    return value


def arguments_of(call: Mapping[str, Any], tools: Mapping[str, Tool]) -> tuple[Tool, dict[str, Any]]:
    """Tool and arguments of a call as the engine's parser gives it. Raises ToolFailure, with words for the model."""
    function = call.get("function") or {}
    name = str(function.get("name"))
    if name not in tools:
        raise ToolFailure("unknown", f"there is no tool {name[:60]}: there are {', '.join(tools)}")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except json.JSONDecodeError as error:
        raise ToolFailure("arguments", f"the arguments are not JSON: {error}") from error
    known = tools[name].schema["function"]["parameters"]
    missing = [each for each in known.get("required", ()) if not isinstance(arguments, dict) or each not in arguments]
    strange = [each for each in arguments if each not in known["properties"]] if isinstance(arguments, dict) else []
    if missing or strange:
        raise ToolFailure("arguments", f"the arguments have to be {', '.join(known['properties'])}")
    return tools[name], arguments
