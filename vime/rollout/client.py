"""Asynchronous client of one engine: generates tokens, pauses the engine and updates its weights."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import aiohttp
import msgspec
import numpy as np

from vime.errors import Cause, VimeError
from vime.recipe.sampling import SamplingSettings
from vime.rollout.answers import MISSING_LOG_PROB, Answer, Span
from vime.rollout.command import IDLE_SECONDS, MODEL_NAME
from vime.rollout.routes import RoutesAsked
from vime.samples import UNVERSIONED, Sample, Status

PauseMode = Literal["keep", "abort", "wait"]
_HEAD = 300


class EngineError(VimeError):
    """A call to an engine failed; the text names engine, route and answer."""

    retry = True
    """True if the same request can succeed on another engine, or on this one after a restart."""


class EngineUnreachable(EngineError):
    """The connection failed, or broke before the answer was complete."""

    cause = Cause.CRASH


class EngineTimeout(EngineError):
    """The engine did not answer within the call's deadline."""

    cause = Cause.CRASH


class EngineStatus(EngineError):
    """The engine answered with an HTTP status other than 200."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status
        # Other 4xx statuses mean that the request is wrong: every engine would refuse it.
        self.retry = status >= 500 or status in (408, 429)


class EngineAnswer(EngineError):
    """The engine answered with status 200, but the answer cannot be right."""


@dataclass(frozen=True)
class RequestDeadlines:
    """Seconds after which a call counts as failed."""

    control: float = 60.0
    weights: float = 600.0
    connect: float = 20.0


@dataclass(slots=True)
class Generated:
    """One answer; the lists have one entry per token."""

    token_ids: list[int]
    log_probs: list[float]
    weight_versions: list[int]
    finish_reason: str
    """`stop`, `length` or `abort`."""
    routes: np.ndarray | None = None
    """Rows of routes, [rows, layers, top-k], if they were asked for (`vime.rollout.routes`)."""

    def append_to(self, sample: Sample) -> None:
        """Append the tokens to a sample (which may hold those of an aborted request) and set its status."""
        sample.response_ids += self.token_ids
        sample.log_probs += self.log_probs
        sample.weight_versions += self.weight_versions
        sample.loss_mask += [1] * len(self.token_ids)
        ends = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
        sample.status = ends[self.finish_reason]


_DECODER = msgspec.json.Decoder(Answer)
_ENCODER = msgspec.json.Encoder()


def parse_answer(body: bytes, max_tokens: int, routes: RoutesAsked | None = None) -> Generated:
    """Parse an answer of `/inference/v1/generate`. Raises EngineAnswer if its counts or values cannot be right."""
    try:
        choices = _DECODER.decode(body).choices
    except msgspec.MsgspecError as error:
        raise EngineAnswer(f"answer is not what vLLM documents: {error}: {_head(body)}") from error
    if len(choices) != 1:
        raise EngineAnswer(f"answer has {len(choices)} choices instead of 1: {_head(body)}")
    choice = choices[0]
    tokens = choice.token_ids or []
    content = choice.logprobs.content if choice.logprobs else None
    log_probs = [token.logprob for token in content or ()]
    if len(log_probs) != len(tokens):
        raise EngineAnswer(f"answer has {len(tokens)} tokens and {len(log_probs)} log-probs")
    if len(tokens) > max_tokens:
        raise EngineAnswer(f"answer has {len(tokens)} tokens, more than the {max_tokens} asked for")
    if choice.finish_reason not in ("stop", "length", "abort"):
        raise EngineAnswer(f"answer ended by {choice.finish_reason!r}")
    if not tokens and choice.finish_reason != "abort":
        raise EngineAnswer(f"answer has no tokens but ended by {choice.finish_reason!r}")
    if choice.finish_reason == "length" and len(tokens) < max_tokens:
        raise EngineAnswer(
            f"answer ended by length at {len(tokens)} of {max_tokens} tokens: raise --vllm-max-model-len"
        )
    # A sum checks every value fast: one that is not finite makes the sum not finite.
    if log_probs and (not math.isfinite(sum(log_probs)) or min(log_probs) <= MISSING_LOG_PROB or max(log_probs) > 1e-3):
        raise EngineAnswer("answer has log-probs that are missing, positive or not finite")
    generated = Generated(tokens, log_probs, _versions(choice.weight_versions, len(tokens)), choice.finish_reason)
    if routes is not None:
        try:
            generated.routes = routes.decode(choice.routed_experts, len(tokens))
        except ValueError as error:
            raise EngineAnswer(str(error)) from error
    return generated


def _versions(spans: Sequence[Span] | None, tokens: int) -> list[int]:
    """Weight version of every token, from vLLM's spans. Raises EngineAnswer if they leave gaps or do not fit."""
    versions: list[int] = []
    for span in spans or ():
        if span.start != len(versions) or span.end < span.start:
            raise EngineAnswer(f"weight versions of {tokens} tokens start again at {span.start} after {len(versions)}")
        number = int(span.version) if span.version.isdecimal() else UNVERSIONED
        versions += [number] * (span.end - span.start)
    if not spans:
        return [UNVERSIONED] * tokens
    if len(versions) != tokens:
        raise EngineAnswer(f"answer has {tokens} tokens and weight versions of {len(versions)}")
    return versions


def _head(body: bytes) -> str:
    return " ".join(body[:_HEAD].decode(errors="replace").split())


@dataclass
class EngineClient:
    """One engine's server. Use as an async context manager, or call `close`. Safe for many tasks of one event loop."""

    url: str
    api_key: str = field(repr=False)
    concurrency: int = 512
    """Limit on generation requests in flight; more wait in this client."""
    deadlines: RequestDeadlines = field(default_factory=RequestDeadlines)
    model: str = MODEL_NAME
    """Name of the model that it serves."""
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)
    _turns: asyncio.Semaphore = field(init=False, repr=False)
    """One turn per generation request in flight."""

    def __post_init__(self) -> None:
        self._turns = asyncio.Semaphore(self.concurrency)
        self.in_flight = 0
        """Generation requests sent or waiting for their turn."""

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; requests in flight fail."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            # The semaphore bounds requests, not the pool, so that control calls never wait behind generation.
            # trust_env stays off, so that traffic between nodes bypasses the cluster's web proxy.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
                headers={"Authorization": f"Bearer {self.api_key}", "Content-Type": "application/json"},
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def generate(
        self,
        token_ids: Sequence[int],
        settings: SamplingSettings,
        *,
        deadline_s: float,
        max_tokens: int | None = None,
        seed: int | None = None,
        data_parallel_rank: int | None = None,
        routes: RoutesAsked | None = None,
    ) -> Generated:
        """Generate one answer to a prompt of token ids. `max_tokens` overrides the setting, to continue an aborted
        sample. With a seed, the random numbers do not depend on the engine's other requests. `routes`: those that the
        answer has to bring.

        The deadline starts when the request is sent, not while it waits for its turn. An aborted request returns the
        tokens generated so far. Raises EngineError.
        """
        limit = settings.max_tokens if max_tokens is None else max_tokens
        sampling = _sampling_parameters(settings, limit, seed)
        if routes is not None:
            sampling["routed_experts_prompt_start"] = routes.start
        body = _ENCODER.encode({"model": self.model, "token_ids": token_ids, "sampling_params": sampling})
        headers = {} if data_parallel_rank is None else {"X-data-parallel-rank": str(data_parallel_rank)}
        answer = await self._ask(body, deadline_s, headers)
        try:
            return parse_answer(answer, limit, routes)
        except EngineAnswer as error:
            raise EngineAnswer(f"engine {self.url}: {error}") from error.__cause__

    async def score(self, token_ids: Sequence[int], *, deadline_s: float) -> bytes:
        """Answer to a request for the log-probs of given tokens, for `vime.rollout.teacher`; takes its turn as others.

        vLLM has to sample a token: the last one, by forbidding all others, so that no request is longer than its
        tokens. With `--logprobs-mode raw_logprobs` its log-prob is that without the ban. Raises EngineError."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": token_ids[-1:], "ignore_eos": True}
        sampling |= {"prompt_logprobs": 0, "logprobs": 0, "detokenize": False}
        body = _ENCODER.encode({"model": self.model, "token_ids": token_ids[:-1], "sampling_params": sampling})
        return await self._ask(body, deadline_s, {})

    async def _ask(self, body: bytes, deadline_s: float, headers: Mapping[str, str]) -> bytes:
        self.in_flight += 1
        try:
            async with self._turns:
                return await self._call("POST", "/inference/v1/generate", deadline_s, body=body, headers=headers)
        finally:
            self.in_flight -= 1

    async def parse(self, token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Tokens of an answer as a chat message: `content`, `reasoning` and `tool_calls`, by the parsers that the
        engine was started with (`--vllm-tool-call-parser`, `--vllm-reasoning-parser`)."""
        choice = {"index": 0, "token_ids": list(token_ids), "finish_reason": "stop"}
        request: dict[str, Any] = {"model": MODEL_NAME, "messages": [{"role": "user", "content": ""}]}
        if tools:
            request |= {"tools": list(tools), "tool_choice": "auto"}
        body = {
            "model": MODEL_NAME,
            "generate_response": {"request_id": "parse", "choices": [choice]},
            "chat_request": request,
        }
        answer = await self._json("POST", "/v1/chat/completions/derender", body)
        try:
            message = answer["choices"][0]["message"]
            return {name: value for name, value in message.items() if value} | {"content": message["content"] or ""}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise EngineAnswer(
                f"engine {self.url}: parsed answer is not what vLLM documents: {answer!r:.300}"
            ) from error

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop scheduling. `keep` freezes requests until `resume`, `abort` ends them, `wait` lets them finish first."""
        await self._json("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        await self._json("POST", "/resume")

    async def is_paused(self) -> bool:
        return bool((await self._json("GET", "/is_paused"))["is_paused"])

    async def abort_all(self) -> int:
        """Abort every request that the engine tracks; each returns its tokens so far. Returns the number of requests.

        Misses a request that is still arriving.
        """
        return int((await self._json("POST", "/abort_requests", {}))["aborted"])

    async def reset_prefix_cache(self) -> None:
        """Discard cached keys and values, which are valid only for the weights that computed them."""
        await self._json("POST", "/reset_prefix_cache")

    async def sleep(self, level: int) -> None:
        """Free device memory: level 1 keeps the weights in host memory, level 2 drops them and keeps buffers."""
        await self._json("POST", f"/sleep?level={level}", deadline_s=self.deadlines.weights)

    async def wake_up(self, tags: Sequence[str] = ()) -> None:
        """Allocate device memory again, all of it or by tag (`weights`, `kv_cache`)."""
        query = "&".join(f"tags={tag}" for tag in tags)
        await self._json("POST", "/wake_up" + (f"?{query}" if query else ""), deadline_s=self.deadlines.weights)

    async def init_weight_transfer(self, info: Mapping[str, Any]) -> None:
        """Connect the weight-transfer backend to the trainer, once per engine start."""
        await self._json("POST", "/init_weight_transfer_engine", {"init_info": dict(info)}, self.deadlines.weights)

    async def start_update(self) -> None:
        """Begin a weight update. The engine must be paused."""
        await self._json("POST", "/start_weight_update", deadline_s=self.deadlines.weights)

    async def start_draft_update(self) -> None:
        """Begin an update of the draft model that the engine speculates with."""
        await self._json("POST", "/start_draft_weight_update", deadline_s=self.deadlines.weights)

    async def update_weights(self, info: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Load one bucket of weights. `info`: one description for all workers, or one for each in order."""
        await self._json("POST", "/update_weights", {"update_info": info}, self.deadlines.weights)

    async def finish_update(self, version: int) -> None:
        """End the update; later tokens carry `version`."""
        await self._json("POST", "/finish_weight_update", {"weight_version": str(version)}, self.deadlines.weights)

    async def weight_info(self) -> int:
        """Version of the engine's weights; UNVERSIONED for those it started with."""
        version = str((await self._json("GET", "/weight_info"))["weight_version"])
        return int(version) if version.isdecimal() else UNVERSIONED

    async def checksums(self) -> dict[str, str]:
        """Tensor name in the engine to checksum; comparable between engines with the same layout."""
        answer = await self._json("POST", "/weight_checker", {"action": "checksum"}, self.deadlines.weights)
        return answer["checksums"]

    async def reset_weights(self) -> None:
        """Set every weight to zero, so that checksums reveal a weight missing from the next update."""
        await self._json("POST", "/weight_checker", {"action": "reset"}, self.deadlines.weights)

    async def metrics(self) -> str:
        """vLLM's metrics in Prometheus text format."""
        return (await self._call("GET", "/metrics", self.deadlines.control)).decode()

    async def _json(self, method: str, path: str, body: Any = None, deadline_s: float | None = None) -> Any:
        encoded = None if body is None else _ENCODER.encode(body)
        answer = await self._call(method, path, deadline_s or self.deadlines.control, body=encoded)
        try:
            return msgspec.json.decode(answer) if answer.strip() else {}
        except msgspec.DecodeError as error:
            raise EngineAnswer(f"engine {self.url}: {method} {path} answered no JSON: {_head(answer)}") from error

    async def _call(
        self, method: str, path: str, deadline_s: float, *, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> bytes:
        """Make a request; returns the answer's body. Raises only EngineErrors, never aiohttp's errors."""
        what = f"engine {self.url}: {method} {path}"
        timeout = aiohttp.ClientTimeout(total=deadline_s, sock_connect=min(deadline_s, self.deadlines.connect))
        try:
            async with self._open().request(
                method, self.url + path, data=body, headers=headers, timeout=timeout
            ) as answer:
                content = await answer.read()
        except TimeoutError as error:
            raise EngineTimeout(f"{what} did not answer within {deadline_s:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineUnreachable(f"{what} failed: {type(error).__name__}: {error}") from error
        if answer.status != 200:
            raise EngineStatus(f"{what} answered {answer.status}: {_head(content)}", answer.status)
        return content


def _sampling_parameters(settings: SamplingSettings, max_tokens: int, seed: int | None) -> dict[str, Any]:
    """vLLM's sampling parameters, with the log-prob of every sampled token. All are set, so that no default of the
    server or the checkpoint's generation config applies."""
    return {
        "seed": seed,
        "n": 1,
        "max_tokens": max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": 0.0,
        "stop": list(settings.stop),
        "stop_token_ids": list(settings.stop_token_ids),
        "logprobs": 0,
        # The sampler decodes the text; the server needs it only for stop words.
        "detokenize": bool(settings.stop),
    }
