"""A server that answers as vLLM's does, at a fixed speed: a peer for benches of the rollout's machinery."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

KEY = "secret"
TOKEN = ord("1")


@dataclass
class SteadyEngine:
    """Start it with `async with`; `port` is its port on loopback. Every answer has `tokens` tokens."""

    tokens: int
    tokens_per_s: float
    max_num_seqs: int
    """Requests served at once; others wait."""
    generated: int = 0
    _aborted: set[asyncio.Event] = field(default_factory=set)

    async def __aenter__(self) -> SteadyEngine:
        self._work = asyncio.Semaphore(self.max_num_seqs)
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/inference/v1/generate", self._generate)
        app.router.add_get("/weight_info", self._weight_info)
        app.router.add_get("/metrics", self._metrics)
        for route in ("/abort_requests", "/pause", "/resume", "/reset_prefix_cache"):
            app.router.add_post(route, self._control)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        await request.json()
        async with self._work:
            aborted = asyncio.Event()
            self._aborted.add(aborted)
            started = asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(aborted.wait(), self.tokens / self.tokens_per_s)
                seconds = asyncio.get_running_loop().time() - started
                made, reason = min(self.tokens - 1, int(seconds * self.tokens_per_s)), "abort"
            except TimeoutError:
                made, reason = self.tokens, "stop"
            finally:
                self._aborted.remove(aborted)
        self.generated += made
        return web.json_response({"choices": [_choice(made, reason)]})

    async def _weight_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": "0"})

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=f'vllm:generation_tokens_total{{engine="0"}} {self.generated}\n')

    async def _control(self, request: web.Request) -> web.Response:
        found = len(self._aborted)
        if request.path == "/abort_requests":
            for event in self._aborted:
                event.set()
        return web.json_response({"aborted": found})


def _choice(tokens: int, reason: str) -> dict[str, Any]:
    """A choice as vLLM writes it."""
    content = [{"token_id": TOKEN, "logprob": -0.25, "rank": 1, "top_logprobs": []}] * tokens
    return {
        "index": 0,
        "token_ids": [TOKEN] * tokens,
        "logprobs": {"content": content},
        "finish_reason": reason,
        "weight_versions": [{"version": "0", "start": 0, "end": tokens}] if tokens else [],
    }


class CharacterTokenizer:
    """Stands in for a checkpoint's tokenizer: one token a character."""

    def __call__(self, texts: list[str], add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(self, chat: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool) -> str:
        return chat[-1]["content"]
