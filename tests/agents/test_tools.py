"""Tools of the built-in environment: what they answer, and what their failures become."""

import contextlib
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_templates import MARKED, tokenizer_of
from tests.support.stub_engine import StubEngine
from vime.agents.sandbox import Limits
from vime.agents.tool_environment import shortened
from vime.agents.tools import ToolFailure, answer, calculate, make_tools
from vime.errors import BadInput, DataError

TOKENIZER = tokenizer_of(MARKED)
PARSER = ("--apply-chat-template", "--vllm-enable-auto-tool-choice", "--vllm-tool-call-parser", "hermes")


def ids(text):
    return TOKENIZER([text], add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        ("(1+2)*3-4", "5"),
        ("7/2", "3.5"),
        ("8/2", "4"),
        ("7//2", "3"),
        ("-7%3", "2"),
        ("2^10", "1024"),
        (" 1.5e3 ", "1500"),
    ],
)
def test_the_calculator_computes(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1/0", "division by zero"),
        ("9**9**9", "too large"),
        ("10**400*10**400*10**400*10**400", "too large"),
        ("1e308*10*0+(1e200**2)", "too large"),
        ("__import__('os')", "only numbers"),
        ("True+1", "only numbers"),
        ("'a'*9", "only numbers"),
        ("(-1)**0.5", "not a real number"),
        ("1+", "no arithmetic expression"),
        ("(" * 400, "no arithmetic expression"),
        ("1" * 2000, "at most 1000 characters"),
    ],
)
def test_the_calculator_refuses_with_words_for_the_model(expression, words):
    with pytest.raises(ValueError, match=words):
        calculate(expression)


@settings(deadline=None)
@given(st.text("0123456789+-*/().^% e", max_size=40))
def test_the_calculator_never_fails_otherwise(expression):
    with contextlib.suppress(ValueError):
        assert isinstance(calculate(expression), str)


async def test_a_function_with_hints_and_a_docstring_is_a_tool():
    tools = make_tools(["agent_plugins:double"], Limits())
    schema = tools["double"].schema["function"]
    assert schema["description"] == "Doubles a number."
    assert schema["parameters"]["properties"]["number"] == {"type": "integer", "description": "The number."}
    assert await answer(tools["double"], {"number": 4}, 5.0) == "8"
    with pytest.raises(ToolFailure, match="ValueError: unlucky") as failure:
        await answer(tools["double"], {"number": 13}, 5.0)
    assert failure.value.kind == "ValueError"


def test_a_function_that_says_nothing_of_itself_is_refused():
    with pytest.raises(BadInput, match="agent_plugins:undocumented has no type hints or docstring"):
        make_tools(["agent_plugins:undocumented"], Limits())
    with pytest.raises(BadInput, match="two of the name calculator"):
        make_tools(["calculator", "calculator"], Limits())


def test_a_long_answer_keeps_its_beginning_and_end():
    text = shortened("a" * 60 + "b" * 60, 40)
    assert text == "a" * 30 + "\n[80 characters left out]\n" + "b" * 10
    assert shortened("short", 40) == "short"


def calls_then_answers(*calls):
    """(answer, parse) of an engine whose model makes these calls in its first turn and then says the last line that it
    was told."""

    def said(token_ids, _number):
        text = TOKENIZER.decode(token_ids)
        if "<tool_response>" in text:
            return [*ids(re.findall(r"<tool_response>\n(.*?)\n?</tool", text, re.DOTALL)[-1].splitlines()[-1]), 0]
        return [*ids("CALL"), 0]

    def parse(token_ids, request):
        text = TOKENIZER.decode(token_ids, skip_special_tokens=True)
        if text != "CALL":
            return {"role": "assistant", "content": text}
        assert request["tools"]
        made = [
            {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for n, (name, arguments) in enumerate(calls)
        ]
        return {"role": "assistant", "content": None, "tool_calls": made}

    return {"answer": said, "parse": parse}


def tools(*names):
    return (
        "--environment",
        "tools",
        "--tools",
        *names,
        *PARSER,
        "--rollout-max-response-len",
        "800",
        "--vllm-max-model-len",
        "2040",
    )


@pytest.mark.e2e
async def test_the_model_calls_tools_until_it_answers(chats, sampler_of):
    code = json.dumps({"code": "print(sum(range(10)))"})
    script = calls_then_answers(("calculator", '{"expression": "6*7"}'), ("python", code))
    async with StubEngine(**script) as engine, sampler_of(chats(*tools("calculator", "python")), engine) as sampler:
        rollout = await sampler.generate(0)
    for sample in rollout.samples:
        assert sample.response == "45"
        assert [turn.role for turn in sample.turns] == ["model", "tool", "model"]
        assert sample.turns[1].text == "42\n45\n"
        assert "Tools: " in TOKENIZER.decode(sample.prompt_ids)
        assert "calculator" in TOKENIZER.decode(sample.prompt_ids)
    assert rollout.metrics["rollout/tool_calls"] == 2.0
    assert rollout.metrics["rollout/tool/python/seconds"] > 0
    assert rollout.metrics["rollout/tool_errors"] == 0.0


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("call", "words", "metric"),
    [
        (("nothing", "{}"), "there is no tool nothing: there are calculator, python, double", "unknown/error/unknown"),
        (("calculator", "{"), "the arguments are not JSON", "calculator/error/arguments"),
        (("calculator", '{"x": 1}'), "the arguments have to be expression", "calculator/error/arguments"),
        (("calculator", "[1]"), "the arguments have to be expression", "calculator/error/arguments"),
        (("calculator", '{"expression": "1/0"}'), "division by zero", "calculator/error/expression"),
        (("double", '{"number": 13}'), "ValueError: unlucky", "double/error/ValueError"),
        (("python", '{"code": "while True: pass"}'), "ended after 1 seconds", "python/error/timeout"),
        (("python", '{"code": "while True: print(1)"}'), "bytes of output", "python/error/flood"),
    ],
)
async def test_a_failure_is_told_to_the_model_and_counted_by_tool_and_kind(chats, sampler_of, call, words, metric):
    flags = tools("calculator", "python", "agent_plugins:double")
    plan = chats(*flags, "--tool-timeout", "1", "--tool-output-characters", "300", "--rollout-batch-size", "1",
                 "--over-sampling-batch-size", "1")  # fmt: skip
    async with StubEngine(**calls_then_answers(call)) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    for sample in rollout.samples:
        assert words in sample.turns[1].text
    assert rollout.metrics[f"rollout/tool/{metric}"] == 2.0
    assert rollout.metrics["rollout/tool_errors"] == 2.0


async def test_a_failing_tool_may_fail_its_sample_instead(chats, sampler_of):
    plan = chats(*tools("agent_plugins:double"), "--on-tool-failure", "fail")
    script = calls_then_answers(("double", '{"number": 13}'))
    async with StubEngine(**script) as engine, sampler_of(plan, engine) as sampler:
        with pytest.raises(DataError, match=r"conversations failed.*the tool double failed: ValueError"):
            await sampler.generate(0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--environment", "tools"), "--environment tools needs --tools: give some of calculator, python"),
        (("--environment", "tools", "--tools", "calculator"), "needs --vllm-enable-auto-tool-choice and"),
        (("--environment", "tools", "--tools", "abacus", *PARSER), "--tools abacus is unknown: give one of calculator"),
        (
            ("--environment", "tools", "--tools", "calculator", "--no-apply-chat-template"),
            "needs --apply-chat-template",
        ),
        (("--environment", "chess"), "--environment chess is unknown: give one of tools"),
        (("--custom-generate-function-path", "generate"), "is unknown"),
        (
            ("--custom-generate-function-path", "agent_plugins:asks_twice", "--environment", "agent_plugins:Guess"),
            "both hold the conversations",
        ),
        (("--environment", "agent_plugins:Gone"), "defines no Gone"),
    ],
)
def test_contradictions_and_wrong_names_are_refused_in_the_dry_run(chats, flags, words):
    with pytest.raises(BadInput, match=words):
        chats(*flags)


def test_tools_without_their_environment_have_no_effect_and_it_is_said(chats):
    assert "--tools: no effect without --environment tools" in chats("--tools", "python").notes
