"""Fixtures shared by the tests of agents."""

import contextlib
import json
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.chat_templates import MARKED, tokenizer_of
from tests.support.plans import plan_of
from tests.support.stub_engine import KEY, StubEngine
from vime.agents.choose import agent_of
from vime.rollout.client import EngineClient, RequestDeadlines
from vime.rollout.dispatch import Patience
from vime.rollout.sampler import Sampler

TOKENIZER = tokenizer_of(MARKED)


@pytest.fixture(autouse=True)
def _plugins(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))


@pytest.fixture
def chats(tmp_path):
    """A function that makes a plan of sums asked in a chat, with flags on top."""
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in range(8) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*flags: str):
        base = ("--prompt-data", str(path), "--rm-type", "reward_plugins:right", "--rollout-batch-size", "4")
        base += ("--over-sampling-batch-size", "4", "--n-samples-per-prompt", "2", "--rollout-max-response-len", "200")
        base += ("--num-steps-per-rollout", "1", "--eval-prompt-data", "sums", str(path))
        base += ("--dynamic-sampling-filter-path", "none", "--no-rollout-shuffle", "--max-staleness", "9")
        base += ("--rollout-timeout", str(patience.ANSWER))
        return plan_of("tiny-qwen3", *base, *flags, nodes=1, run_dir=tmp_path)

    return make


@pytest.fixture
def sampler_of():
    """A context manager: a sampler of a plan and a stub engine, with the plan's agent."""

    @contextlib.asynccontextmanager
    async def make(plan, engine: StubEngine):
        async with contextlib.AsyncExitStack() as stack:
            client = EngineClient(engine.url, KEY, concurrency=64, deadlines=RequestDeadlines(control=patience.STUB))
            await stack.enter_async_context(client)
            agent = agent_of(plan.recipe)
            if agent is not None:
                await stack.enter_async_context(agent)
            waits = Patience(recovery=patience.ANSWER, abort=patience.ANSWER)
            sampler = Sampler(plan, [client], patience=waits, tokenizer=TOKENIZER, agent=agent)
            yield await stack.enter_async_context(sampler)

    return make
