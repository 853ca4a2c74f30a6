"""The engines' token route answers as vLLM's own does, in the fields that are read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import numpy as np
import pytest

from vime.rollout.answers import MISSING_LOG_PROB, Answer
from vime.rollout.client import parse_answer

pytestmark = pytest.mark.e2e
TOKENS = [7, 8, 9]


def output(log_probs: list[float], reason: str = "stop", prompt: Any = None) -> Any:
    """The last output of a request, as vLLM's engine makes it with flat log-probs."""
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan

    flat = FlatLogprobs()
    for token, value in zip(TOKENS, log_probs, strict=True):
        flat.append_fast([token], [value], iter([1]), [None])  # type: ignore[arg-type]
    routes = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    spans = [WeightVersionSpan("4", 0, 2), WeightVersionSpan("5", 2, 3)]
    answer = CompletionOutput(0, "", TOKENS, 0.0, flat, routes, finish_reason=reason, weight_versions=spans)
    return RequestOutput("r", None, [1, 2], prompt, [answer], finished=True)


async def answers(found: Any) -> tuple[bytes, bytes]:
    """Answers of this route and of vLLM's to the same output."""
    from vllm import SamplingParams
    from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    from vime.rollout.fast_answers import FastTokens

    async def outputs() -> AsyncIterator[Any]:
        yield found

    theirs: Any = object.__new__(ServingTokens)
    theirs.has_tokenizer = theirs.enable_prompt_tokens_details = theirs.enable_log_outputs = False
    theirs.request_logger = theirs.renderer = None
    ours = FastTokens.of(theirs)
    prompt = 0 if found.prompt_logprobs is not None else None
    request = GenerateRequest(token_ids=[1, 2], sampling_params=SamplingParams(logprobs=0, prompt_logprobs=prompt))
    request._response_mm_placeholders = None
    about = RequestResponseMetadata(request_id="r")
    mine: Any = await ours.serve_tokens_full_generator(request, outputs(), "r", "m", about)
    other: Any = await theirs.serve_tokens_full_generator(request, outputs(), "r", "m", about)
    return mine, json.dumps(other.model_dump()).encode()


async def test_the_answer_is_that_of_vllms_own_route() -> None:
    mine, theirs = await answers(output([-0.25, -1.5, -3.0]))
    assert msgspec.json.decode(mine, type=Answer) == msgspec.json.decode(theirs, type=Answer)
    generated = parse_answer(mine, 3)
    assert (generated.token_ids, generated.log_probs) == (TOKENS, [-0.25, -1.5, -3.0])
    assert generated.weight_versions == [4, 4, 5]


async def test_log_probs_of_a_prompt_too() -> None:
    from vllm.logprobs import Logprob

    mine, theirs = await answers(output([-1.0] * 3, prompt=[None, {2: Logprob(-0.5, 1)}]))
    assert msgspec.json.decode(mine, type=Answer) == msgspec.json.decode(theirs, type=Answer)
    assert msgspec.json.decode(mine)["prompt_logprobs"] == [None, {"2": {"logprob": -0.5}}]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
async def test_what_is_no_number_falls_to_vllms_floor(value: float) -> None:
    mine, theirs = await answers(output([value, -1.0, -1.0]))
    found = msgspec.json.decode(mine, type=Answer)
    assert found == msgspec.json.decode(theirs, type=Answer)
    assert found.choices[0].logprobs.content[0].logprob == MISSING_LOG_PROB  # type: ignore[union-attr,index]


async def test_a_failed_request_is_vllms_error() -> None:
    with pytest.raises(Exception, match="Internal server error"):
        await answers(output([-1.0] * 3, reason="error"))


async def test_a_server_has_the_route_behind_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM adds it to its server."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from vime.rollout.fast_answers import PATH, GuardedAnswers

    monkeypatch.setenv("VLLM_API_KEY", "k")
    app = FastAPI()
    app.add_middleware(GuardedAnswers)
    with TestClient(app) as client:
        assert client.post(PATH, json={}).status_code == 401
        answer = client.post(PATH, json={}, headers={"Authorization": "Bearer k"})
    # The route reads the request, which lacks its tokens.
    assert answer.status_code == 422
    assert "token_ids" in answer.text
