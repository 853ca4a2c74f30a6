"""Middleware of a vLLM server: its token route without an object of its protocol for every token of an answer.

vLLM makes each token's log-prob a pydantic model, dumps it and writes JSON with the standard library, all in the event
loop that also hands tokens from the engine to requests; that costs tens of microseconds a token. The route of this
module takes the same requests at the same path, but for streams and text, and writes the fields of
`vime.rollout.answers` alone. The server loads it through `--middleware`; all but the answer's JSON is vLLM's.
"""

# FastAPI reads the annotations of routes, so they stay objects: no annotations from __future__.
import copy
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateRequest
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.utils.serial_utils import numpy2base64

from vime.rollout.answers import MISSING_LOG_PROB, Answer, Choice, LogProbs, Span, TokenLogProb
from vime.rollout.guard import RequireKey

PATH = "/inference/v1/generate"
_ENCODER = msgspec.json.Encoder()
_App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class FastAnswers:
    """ASGI middleware that puts the route before vLLM's own when the server starts; it sees no request."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            add_route(scope["app"])
        await self._app(scope, receive, send)


class GuardedAnswers(RequireKey):
    """Both middlewares as one: vLLM takes several, but warns of an option that is given twice."""

    def __init__(self, app: _App) -> None:
        super().__init__(FastAnswers(app))


def add_route(app: FastAPI) -> None:
    """Put `generate` before all routes of the app."""
    app.router.add_api_route(PATH, generate, methods=["POST"], response_model=None)
    app.router.routes.insert(0, app.router.routes.pop())


@with_cancellation
@load_aware_call
async def generate(request: GenerateRequest, raw_request: Request) -> Response:
    """Answer a request for tokens; one for a stream or for text is refused with 400. Other errors are vLLM's own."""
    if request.stream or request.output_mode != "tokens":
        return JSONResponse({"error": "this engine answers with whole answers of tokens only"}, status_code=400)
    # Lists of numbers instead of a dictionary for every token, which the garbage collector would have to visit.
    request.sampling_params.flat_logprobs = True
    state = raw_request.app.state
    if not hasattr(state, "vime_tokens"):
        state.vime_tokens = FastTokens.of(state.serving_tokens)
    answer = cast(bytes | ErrorResponse, await state.vime_tokens.serve_tokens(request, raw_request))
    if isinstance(answer, ErrorResponse):
        return JSONResponse(content=answer.model_dump(), status_code=answer.error.code)
    return Response(answer, media_type="application/json")


class FastTokens(ServingTokens):
    """vLLM's handler of token requests, with answers as bytes of JSON."""

    @classmethod
    def of(cls, handler: ServingTokens) -> "FastTokens":
        """The same handler with other answers."""
        found = copy.copy(handler)
        found.__class__ = cls
        return cast(FastTokens, found)

    async def serve_tokens_full_generator(  # type: ignore[override]
        self,
        request: GenerateRequest,
        result_generator: AsyncGenerator[RequestOutput, None],
        request_id: str,
        *_: Any,
        **__: Any,
    ) -> bytes | ErrorResponse:
        final = None
        async for output in result_generator:
            final = output
        if final is None:
            raise RuntimeError(f"request {request_id} ended without an output")
        for output in final.outputs:
            self._raise_if_error(output.finish_reason, request_id)
        return encoded(final)


def encoded(output: RequestOutput) -> bytes:
    """JSON of an `Answer`, out of an engine's last output of a request with flat log-probs."""
    return _ENCODER.encode(Answer([_choice(each) for each in output.outputs], _scores(output)))


def _choice(output: CompletionOutput) -> Choice:
    log_probs = None
    if (found := output.logprobs) is not None:
        if not isinstance(found, FlatLogprobs) or len(found) != len(output.token_ids):
            raise RuntimeError(f"vLLM gave {type(found).__name__} of {len(found)} for {len(output.token_ids)} tokens")
        # The first of a place is the sampled token's.
        log_probs = LogProbs([TokenLogProb(_finite(found.logprobs[first])) for first in found.start_indices])
    spans, routes = output.weight_versions, output.routed_experts
    return Choice(
        list(output.token_ids),
        log_probs,
        output.finish_reason or "stop",
        None if spans is None else [Span(span.version, span.start, span.end) for span in spans],
        None if routes is None else numpy2base64(routes),
    )


def _scores(output: RequestOutput) -> list[dict[str, TokenLogProb] | None] | None:
    if output.prompt_logprobs is None:
        return None
    return [
        {str(token): TokenLogProb(_finite(each.logprob)) for token, each in place.items()} if place else None
        for place in output.prompt_logprobs
    ]


def _finite(value: float) -> float:
    """vLLM's floor, which NaN falls to as well."""
    return value if value > MISSING_LOG_PROB else MISSING_LOG_PROB
