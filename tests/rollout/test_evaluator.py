"""Evaluation with engines alone: the same values as the sampler's, without prompts to train on."""

from __future__ import annotations

import contextlib

from tests.support import patience
from tests.support.stub_engine import KEY, CharacterTokenizer, StubEngine
from vime.rollout import evaluator
from vime.rollout.client import EngineClient, RequestDeadlines
from vime.rollout.evaluator import Evaluator
from vime.rollout.sampler import Sampler


async def values_of(engine, make):
    async with contextlib.AsyncExitStack() as stack:
        client = EngineClient(engine.url, KEY, concurrency=64, deadlines=RequestDeadlines(control=patience.STUB))
        maker = make(await stack.enter_async_context(client))
        return await (await stack.enter_async_context(maker)).evaluate(3)


async def test_an_evaluation_needs_no_prompts_of_training_and_agrees_with_the_loops(sums, monkeypatch):
    monkeypatch.setattr(evaluator, "load_tokenizer", lambda *_, **__: CharacterTokenizer())
    whole = sums()
    options = whole.recipe.rollout.model_copy(update={"prompt_data": []})
    alone = whole.model_copy(update={"recipe": whole.recipe.model_copy(update={"rollout": options})})
    async with StubEngine() as engine:
        ours = await values_of(engine, lambda client: Evaluator(alone, [client]))
        theirs = await values_of(engine, lambda client: Sampler(whole, [client], tokenizer=CharacterTokenizer()))
    assert ours == theirs
    assert ours["eval/sums"] == 1.0
    assert ours["eval/sums/pass@1"] == 1.0
