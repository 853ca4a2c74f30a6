"""Stub vLLM server for protocol faults: answers at once or at a fixed speed, fails on request, remembers requests.

Its "model" answers the arithmetic question in the prompt's tokens (character codes) with fixed log-probs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support import patience

END = 0
KEY = "secret"


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def answer_of(token_ids: list[int]) -> list[int]:
    """The sum asked for in the prompt, as tokens with the end token."""
    text = "".join(chr(token) for token in token_ids)
    question = text.partition("=")[0]
    return [*encode(str(sum(int(part) for part in question.split("+")))), END]


@dataclass
class StubEngine:
    """Start with `async with`; `url` is its address."""

    tokens_per_s: float | None = None
    """Of every request; None answers at once."""
    answer: Callable[[list[int], int], list[int]] = lambda token_ids, _: answer_of(token_ids)
    """Answer to (prompt, number of the request)."""
    fault: Callable[[int, dict[str, Any]], Any] = lambda _number, _body: None
    """Given the number of the request and its body: None, an HTTP status, "reset", "hang", or a changed answer."""
    holds: Callable[[list[int]], bool] = lambda _token_ids: False
    """Prompts that are answered only after `release`, or with half of their tokens when they are aborted."""
    parse: Callable[[list[int], dict[str, Any]], dict[str, Any]] = lambda ids, _: {
        "role": "assistant",
        "content": str(ids),
    }
    """The chat message that it makes of (token ids, the chat request)."""
    score: Callable[[int, int], float] = lambda token, place: -0.01 * token - place
    """Log-prob of a given token at a place, where a request asks for those of its prompt."""
    version: str = "0"
    max_num_seqs: int = 10_000
    """Requests that it works on at a time."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    generated: int = 0
    calls: list[str] = field(default_factory=list)

    async def __aenter__(self) -> StubEngine:
        self._aborts: dict[asyncio.Event, float] = {}
        self._work = asyncio.Semaphore(self.max_num_seqs)
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._now = 0
        self._released = asyncio.Event()
        self._arrival = asyncio.Condition()
        app = web.Application(middlewares=[self._guard], client_max_size=2**26)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_post("/v1/chat/completions/derender", self._derender)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_get("/metrics", self._metrics)
        for route in ("/abort_requests", "/pause", "/resume", "/reset_prefix_cache"):
            app.router.add_post(route, self._control)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await self.listen()
        return self

    async def listen(self, port: int = 0) -> None:
        self._site = web.TCPSite(self._runner, "127.0.0.1", port)
        await self._site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def has_requests(self, count: int) -> None:
        """Wait until so many requests have come in."""
        async with self._arrival:
            await asyncio.wait_for(self._arrival.wait_for(lambda: len(self.requests) >= count), patience.PROCESS)

    def release(self) -> None:
        """Answer what was held."""
        self._released.set()

    async def die(self) -> None:
        """Close the port and every connection."""
        await self._site.stop()
        for connection in list(self._runner.server.connections):
            connection.force_close()
            if connection.transport is not None:
                connection.transport.abort()

    async def __aexit__(self, *_: object) -> None:
        for event in self._aborts:
            event.set()
        await self._runner.cleanup()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": "no key"}, status=401)
        return await handler(request)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body | {"rank": request.headers.get("X-data-parallel-rank")})
        async with self._arrival:
            self._arrival.notify_all()
        fault = self.fault(number, body)
        if isinstance(fault, int):
            return web.json_response({"error": "as told"}, status=fault)
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault == "hang":
            await asyncio.sleep(3600)
        if isinstance(fault, dict):
            return web.json_response(fault if "prompt_logprobs" in fault else {"choices": [fault]})
        if body["sampling_params"].get("prompt_logprobs") is not None:
            (last,) = body["sampling_params"]["allowed_token_ids"]
            return web.json_response(self._scored(body["token_ids"], last))
        limit = body["sampling_params"]["max_tokens"]
        tokens = self.answer(body["token_ids"], number)
        reason = "stop" if len(tokens) <= limit else "length"
        tokens = tokens[:limit]
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            held = self.holds(body["token_ids"])
            done = await (self._hold(len(tokens)) if held else self._take_time(len(tokens)))
        finally:
            self._now -= 1
        if done < len(tokens):
            tokens, reason = tokens[:done], "abort"
        self.generated += len(tokens)
        return web.json_response({"choices": [choice(tokens, reason, self.version)]})

    def _scored(self, token_ids: list[int], last: int) -> dict[str, Any]:
        """An answer with the log-prob of every given token but the first, and of the one that may be sampled, as vLLM
        writes it."""
        scores = [
            {str(token): {"logprob": self.score(token, place), "rank": 1, "decoded_token": None}}
            for place, token in enumerate(token_ids)
        ]
        sampled = choice([last], "length", self.version)
        sampled["logprobs"]["content"][0]["logprob"] = self.score(last, len(token_ids))
        return {"choices": [sampled], "prompt_logprobs": [None, *scores[1:]]}

    async def _derender(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids = body["generate_response"]["choices"][0]["token_ids"]
        message = {"content": None, "tool_calls": [], **self.parse(ids, body["chat_request"])}
        return web.json_response({"choices": [{"index": 0, "message": message}]})

    async def _hold(self, tokens: int) -> int:
        """All tokens once released, half of them when aborted."""
        aborted = asyncio.Event()
        self._aborts[aborted] = asyncio.get_running_loop().time()
        waits = [asyncio.ensure_future(event.wait()) for event in (aborted, self._released)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._aborts[aborted]
            for wait in waits:
                wait.cancel()
        return tokens // 2 if aborted.is_set() else tokens

    async def _take_time(self, tokens: int) -> int:
        """Tokens made until the answer is whole or aborted."""
        if self.tokens_per_s is None:
            return tokens
        async with self._work:
            aborted = asyncio.Event()
            self._aborts[aborted] = started = asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(aborted.wait(), tokens / self.tokens_per_s)
            except TimeoutError:
                return tokens
            finally:
                del self._aborts[aborted]
            return min(tokens - 1, int((asyncio.get_running_loop().time() - started) * self.tokens_per_s))

    async def _weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def _metrics(self, _: web.Request) -> web.Response:
        now = asyncio.get_running_loop().time()
        made = self.generated + sum((now - start) * (self.tokens_per_s or 0) for start in self._aborts.values())
        return web.Response(text=f'vllm:generation_tokens_total{{engine="0"}} {made}\n')

    async def _control(self, request: web.Request) -> web.Response:
        self.calls.append(request.path_qs)
        aborted = len(self._aborts)
        if request.path == "/abort_requests":
            for event in self._aborts:
                event.set()
        return web.json_response({"aborted": aborted})


def choice(tokens: list[int], reason: str = "stop", version: str = "0") -> dict[str, Any]:
    """A choice as vLLM writes it."""
    content = [{"token_id": t, "logprob": -0.25, "rank": 1, "top_logprobs": []} for t in tokens]
    spans = [{"version": version, "start": 0, "end": len(tokens)}] if tokens else []
    return {
        "index": 0,
        "token_ids": tokens,
        "logprobs": {"content": content},
        "finish_reason": reason,
        "weight_versions": spans,
    }


class CharacterTokenizer:
    """Stands in for a checkpoint's tokenizer: one token a character."""

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [encode(text) for text in texts]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(token) for token in token_ids if token != END)

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        assert not tokenize
        return chat[-1]["content"]
