"""The client against a stub server: answers are checked, every fault has its own error, every call ends."""

import asyncio
import json

import pytest

from tests.support import patience
from tests.support.stub_engine import KEY, StubEngine, answer_of, choice, encode
from vime.rollout.client import (
    UNVERSIONED,
    EngineAnswer,
    EngineClient,
    EngineStatus,
    EngineTimeout,
    EngineUnreachable,
    RequestDeadlines,
    SamplingSettings,
    parse_answer,
)
from vime.samples import Sample, Status

SETTINGS = SamplingSettings(max_tokens=8)


def sample() -> Sample:
    return Sample(0, 0, "3+4=", encode("3+4="))


async def test_an_answer_becomes_tokens_logprobs_and_weight_versions_of_a_sample():
    async with StubEngine(version="7") as engine, EngineClient(engine.url, KEY) as client:
        generated = await client.generate(encode("3+4="), SETTINGS, deadline_s=patience.MOMENT, data_parallel_rank=3)
    it = sample()
    generated.append_to(it)
    assert it.response_ids == answer_of(encode("3+4="))
    assert it.log_probs == [-0.25] * 2
    assert it.weight_versions == [7, 7]
    assert it.loss_mask == [1, 1]
    assert it.status == Status.COMPLETED
    request = engine.requests[0]
    assert request["rank"] == "3"
    assert request["sampling_params"]["logprobs"] == 0
    assert request["sampling_params"]["temperature"] == 1.0


async def test_no_more_requests_than_the_concurrency_are_under_way():
    async with StubEngine(tokens_per_s=40) as engine, EngineClient(engine.url, KEY, concurrency=4) as client:
        await asyncio.gather(
            *(client.generate(encode("1+1="), SETTINGS, deadline_s=patience.MOMENT) for _ in range(20))
        )
    assert len(engine.requests) == 20
    assert engine.most_at_once == 4


@pytest.mark.parametrize(
    ("fault", "error", "retry"),
    [
        (500, EngineStatus, True),
        (503, EngineStatus, True),
        (429, EngineStatus, True),
        (400, EngineStatus, False),
        ("reset", EngineUnreachable, True),
        ("hang", EngineTimeout, True),
        (choice([1, 2]) | {"token_ids": [1]}, EngineAnswer, True),
        (choice([1] * 9), EngineAnswer, True),
        (choice([1], "length"), EngineAnswer, True),
        (choice([], "stop"), EngineAnswer, True),
        (choice([1], "error"), EngineAnswer, True),
        (choice([1]) | {"logprobs": None}, EngineAnswer, True),
        (choice([1]) | {"weight_versions": [{"version": "1", "start": 0, "end": 5}]}, EngineAnswer, True),
        (choice([1, 2]) | {"weight_versions": [{"version": "1", "start": 1, "end": 2}]}, EngineAnswer, True),
        ({"token_ids": "?"}, EngineAnswer, True),
    ],
)
async def test_every_fault_is_named_with_the_engine_and_says_whether_to_repeat(fault, error, retry):
    async with StubEngine(fault=lambda *_: fault) as engine, EngineClient(engine.url, KEY) as client:
        with pytest.raises(error, match=engine.url) as caught:
            await client.generate(encode("1+1="), SETTINGS, deadline_s=0.3)
    assert caught.value.retry == retry


async def test_an_engine_that_is_not_there_is_unreachable_and_a_wrong_key_is_refused():
    async with StubEngine() as engine:
        async with EngineClient(engine.url, "wrong") as client:
            with pytest.raises(EngineStatus, match="401"):
                await client.weight_info()
        await engine.die()
        async with EngineClient(engine.url, KEY, deadlines=RequestDeadlines(control=patience.STUB)) as client:
            with pytest.raises(EngineUnreachable):
                await client.pause()


async def test_the_key_is_never_part_of_an_error():
    async with StubEngine(fault=lambda *_: 500) as engine, EngineClient(engine.url, KEY) as client:
        with pytest.raises(EngineStatus) as caught:
            await client.generate(encode("1+1="), SETTINGS, deadline_s=patience.STUB)
    assert KEY not in str(caught.value)
    assert KEY not in repr(client)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -9999.0, 0.5])
def test_logprobs_that_cannot_be_are_refused(value):
    wrong = choice([5])
    wrong["logprobs"]["content"][0]["logprob"] = value
    body = json.dumps({"choices": [wrong]}).replace("NaN", "null").replace("Infinity", "1e999")
    with pytest.raises(EngineAnswer):
        parse_answer(body.encode(), 8)


def test_tokens_on_both_sides_of_a_weight_update_keep_their_versions():
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "3", "start": 1, "end": 3}]
    body = json.dumps({"choices": [choice([1, 2, 3]) | {"weight_versions": spans}]}).encode()
    assert parse_answer(body, 8).weight_versions == [UNVERSIONED, 3, 3]


def test_an_aborted_sample_goes_on_where_it_stopped():
    it = sample()
    for tokens, reason, version in (([], "abort", "1"), ([5, 6], "abort", "1"), ([7], "stop", "2")):
        parse_answer(json.dumps({"choices": [choice(tokens, reason, version)]}).encode(), 8).append_to(it)
    assert it.response_ids == [5, 6, 7]
    assert it.weight_versions == [1, 1, 2]
    assert it.status == Status.COMPLETED
