"""The examples of docs/agents.md, held with a scripted model: one for each way in."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_templates import MARKED, tokenizer_of
from tests.support.scripted import ScriptedDispatcher, session_of, settings_of
from vime.agents.environment import hold
from vime.agents.sandbox import Limits
from vime.agents.tools import answer, make_tools
from vime.samples import Sample, Status

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"
TOKENIZER = tokenizer_of(MARKED)


@pytest.fixture
def page() -> dict[str, Any]:
    """Names that the page's examples define."""
    found: dict[str, Any] = {"__name__": "my_agents"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(code, found)
    return found


def conversation(*answers: str, prompt: str = "2+3?", label: str = "5"):
    turns = [([*TOKENIZER([text], add_special_tokens=False)["input_ids"][0], 0], "stop") for text in answers]
    settings = settings_of(ScriptedDispatcher(turns), TOKENIZER)
    messages = [{"role": "user", "content": prompt}]
    sample = Sample(0, 0, prompt, settings.template.prompt(messages), label=label)
    return session_of(settings, sample)


def roles(session) -> list[str]:
    return [turn.role for turn in session.turns]


async def test_the_example_of_a_function_lets_the_model_look_again(page):
    session = conversation("4", "5")
    await page["solve_and_check"](session, session.sample)
    session.finish()
    assert roles(session) == ["model", "user", "model"]
    assert session.sample.response == "5"
    assert session.sample.status == Status.COMPLETED


@pytest.mark.parametrize(("answers", "reward"), [(["50", "75", "70"], 1.0), (["1", "2", "3", "4", "5"], 0.0)])
async def test_the_example_of_an_environment_plays_to_its_end(page, answers, reward):
    session = conversation(*answers, label="70")
    await hold(session, page["GuessTheNumber"]())
    assert session.sample.reward == reward
    assert next(turn.text for turn in session.turns if not turn.sampled) == "higher"
    assert len([turn for turn in session.turns if turn.sampled]) == len(answers)


async def test_the_example_of_a_tool_answers_and_describes_itself(page, monkeypatch):
    monkeypatch.setattr("vime.agents.tools.load", lambda target: page[target.partition(":")[2]])
    tool = make_tools(["my_agents:distance"], Limits())["distance"]
    assert set(tool.schema["function"]["parameters"]["properties"]) == {"start", "end"}
    assert await answer(tool, {"start": "Berlin", "end": "Bonn"}, 5.0) == "600 km"


async def test_the_example_of_a_program_speaks_with_the_model(page):
    session = conversation("4", "5")
    await page["by_program"](session, session.sample)
    session.finish()
    assert roles(session) == ["model", "user", "model"]
    assert session.sample.reward == 1.0
    assert session.branches == []
