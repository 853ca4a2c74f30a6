"""An environment of the real verifiers library, in a virtual environment of its own, holds a conversation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import patience
from tests.support.chat_templates import MARKED, tokenizer_of
from tests.support.scripted import ScriptedDispatcher, session_of, settings_of
from vime.samples import Sample

# The library comes from the network.
pytestmark = [pytest.mark.e2e, pytest.mark.full]

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"
TOKENIZER = tokenizer_of(MARKED)
UV = Path(sys.executable).parent / "uv"
VERSION = "0.4.0"
ENVIRONMENT = """
import verifiers.v1 as vf

__all__ = ["GuessEnv", "GuessTaskset"]


class GuessData(vf.TaskData):
    number: int


class GuessTask(vf.Task[GuessData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.number))


class GuessTaskset(vf.Taskset[GuessTask, vf.TasksetConfig]):
    def load(self):
        for number in range(10):
            yield GuessTask(GuessData(prompt="Guess my number below ten.", number=number), self.config.task)


class GuessConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(harness={"id": "null"}, runtime=vf.SubprocessConfig())


class GuessEnv(vf.Env[GuessConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            while not said.terminated and said.last_reply != str(task.data.number):
                low = int(said.last_reply) < task.data.number
                said = await talk.turn("higher" if low else "lower")
"""


@pytest.fixture(scope="module")
def verifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with verifiers and the environment above."""
    folder = tmp_path_factory.mktemp("verifiers")
    python = folder / "bin" / "python"
    commands = (
        [UV, "venv", "--quiet", "--python", sys.executable, folder, "--allow-existing"],
        [UV, "pip", "install", "--quiet", "--python", python, f"verifiers=={VERSION}"],
    )
    for command in commands:
        told = subprocess.run(command, capture_output=True, text=True, timeout=patience.GROUP)
        assert told.returncode == 0, told.stderr
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "guess_below_ten.py").write_text(ENVIRONMENT)
    return folder


@pytest.fixture
def by_verifiers(verifiers: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function of docs/agents.md."""
    monkeypatch.setenv("VF_EVAL", str(verifiers / "bin" / "vf-eval"))
    # The library looks for uv, and prepares its own chat program with it.
    monkeypatch.setenv("PATH", str(UV.parent), prepend=":")
    monkeypatch.setenv("HOME", str(verifiers))
    [code] = [block for block in PAGE.read_text().split("```python\n") if "def by_verifiers" in block]
    found: dict[str, Any] = {}
    exec(code.partition("```")[0], found)
    return found["by_verifiers"]


def conversation(*answers: str, number: int) -> Any:
    turns = [([*TOKENIZER([text], add_special_tokens=False)["input_ids"][0], 0], "stop") for text in answers]
    settings = settings_of(ScriptedDispatcher(turns), TOKENIZER)
    task = {"environment": "guess_below_ten", "index": number}
    return session_of(settings, Sample(0, 0, "unused", [1], metadata=task))


async def test_its_turns_are_one_line_of_the_models_own_tokens_and_its_reward_is_the_samples(by_verifiers) -> None:
    session = conversation("4", "8", "6", number=6)
    await by_verifiers(session, session.sample)
    assert [(turn.role, turn.text) for turn in session.turns] == [
        ("model", "4"),
        ("user", "higher"),
        ("model", "8"),
        ("user", "lower"),
        ("model", "6"),
    ]
    assert "Guess my number below ten." in TOKENIZER.decode(session.sample.prompt_ids)
    assert session.branches == []
    assert session.sample.reward == 1.0


async def test_a_failure_of_the_environment_is_no_reward_of_zero(by_verifiers) -> None:
    session = conversation("what?", number=6)
    with pytest.raises(RuntimeError, match=r"verifiers failed: .*invalid literal for int"):
        await by_verifiers(session, session.sample)
    assert session.sample.reward is None
