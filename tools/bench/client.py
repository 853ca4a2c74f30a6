"""Requests a second of vime's client and of the openai client, on one stub server that answers at once, on one core.

    python tools/bench/client.py [--requests 2048] [--concurrency 1024] [--long-share 0.02] [--long-tokens 8192]

The stub is a process of its own on another core and answers from bytes made once, so that the clients are what is
measured. A share of the answers has thousands of token ids with their log-probs. Each client gets its answers in the
format of the route it uses: vime `/inference/v1/generate`, openai `/v1/completions` with token ids and log-probs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

PROMPT = list(range(100, 228))
SHORT = 64
WANTED = 10
LOGPROB = -0.6931471805599453


@dataclass(frozen=True)
class Load:
    """Requests to the stub."""

    requests: int
    concurrency: int
    long_share: float
    long_tokens: int

    def tokens(self, number: int) -> int:
        """Tokens of the answer to a request; the long ones are spread evenly."""
        if int((number + 1) * self.long_share) > int(number * self.long_share):
            return self.long_tokens
        return SHORT


def generate_body(tokens: int) -> bytes:
    """As vLLM answers `/inference/v1/generate` with log-probs."""
    ids = [1000 + i % 100000 for i in range(tokens)]
    one = [{"token_id": i, "logprob": LOGPROB, "rank": 1} for i in ids]
    choice = {
        "index": 0,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": ids,
        "routed_experts": None,
        "weight_versions": [{"version": "3", "start": 0, "end": tokens}],
        "logprobs": {"content": [entry | {"top_logprobs": [entry]} for entry in one]},
    }
    usage = {"prompt_tokens": len(PROMPT), "total_tokens": len(PROMPT) + tokens, "completion_tokens": tokens}
    return json.dumps(
        {"request_id": "r", "model": "policy", "created": 1, "usage": usage, "choices": [choice]}
    ).encode()


def completions_body(tokens: int) -> bytes:
    """As vLLM answers `/v1/completions` with `return_token_ids` and `logprobs: 0`."""
    ids = [1000 + i % 100000 for i in range(tokens)]
    words = [f" word{i}" for i in ids]
    logprobs = {
        "tokens": words,
        "token_logprobs": [LOGPROB] * tokens,
        "top_logprobs": [{word: LOGPROB} for word in words],
        "text_offset": list(range(0, 9 * tokens, 9)),
    }
    choice = {
        "index": 0,
        "text": "".join(words),
        "logprobs": logprobs,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": ids,
        "prompt_logprobs": None,
    }
    usage = {"prompt_tokens": len(PROMPT), "total_tokens": len(PROMPT) + tokens, "completion_tokens": tokens}
    body = {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": "policy",
        "choices": [choice],
        "usage": usage,
    }
    return json.dumps(body).encode()


class Stub(asyncio.Protocol):
    """The least of an HTTP/1.1 server: keep-alive, Content-Length, two routes."""

    answers: dict[tuple[bytes, int], bytes]

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end]
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0] or 0)
            if len(self._buffer) < end + 4 + length:
                return
            body = self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            path = head.split(b" ", 2)[1]
            tokens = int(body.partition(b'"max_tokens":')[2].lstrip().split(b",", 1)[0].split(b"}", 1)[0])
            self._transport.write(self.answers[path, tokens])


def serve(load: Load, core: int, port: Connection) -> None:
    """The stub's process."""
    os.sched_setaffinity(0, {core})

    async def run() -> None:
        Stub.answers = {}
        for path, make in ((b"/inference/v1/generate", generate_body), (b"/v1/completions", completions_body)):
            for tokens in (SHORT, load.long_tokens):
                body = make(tokens)
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
                Stub.answers[path, tokens] = head + body
        server = await asyncio.get_running_loop().create_server(Stub, "127.0.0.1", 0, backlog=4096)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


Ask = Callable[[int], Awaitable[int]]


async def measure(load: Load, ask: Ask) -> tuple[float, float]:
    """Requests a second by the clock, and by this process's processor time."""
    await asyncio.gather(*(ask(SHORT) for _ in range(load.concurrency)))  # connections are opened
    limit = asyncio.Semaphore(load.concurrency)

    async def one(number: int) -> None:
        async with limit:
            wanted = load.tokens(number)
            assert await ask(wanted) == wanted

    start, cpu = time.monotonic(), time.process_time()
    await asyncio.gather(*(one(number) for number in range(load.requests)))
    return load.requests / (time.monotonic() - start), load.requests / (time.process_time() - cpu)


async def vime_client(load: Load, url: str) -> tuple[float, float]:
    from vime.rollout.client import EngineClient, SamplingSettings

    settings = SamplingSettings(SHORT)
    async with EngineClient(url, "key", concurrency=load.concurrency) as client:

        async def ask(tokens: int) -> int:
            answer = await client.generate(PROMPT, settings, max_tokens=tokens, deadline_s=600)
            assert len(answer.log_probs) == len(answer.weight_versions) == tokens
            return len(answer.token_ids)

        return await measure(load, ask)


async def openai_client(load: Load, url: str) -> tuple[float, float]:
    import openai
    from openai import _constants

    # Its default pool keeps 100 connections; without more, opening connections is what would be measured.
    make = type(_constants.DEFAULT_CONNECTION_LIMITS)
    limits = make(max_connections=load.concurrency, max_keepalive_connections=load.concurrency)
    http = openai.DefaultAsyncHttpxClient(limits=limits, trust_env=False)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=600, http_client=http)

    async def ask(tokens: int) -> int:
        answer = await client.completions.create(
            model="policy", prompt=PROMPT, max_tokens=tokens, logprobs=0, extra_body={"return_token_ids": True}
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == tokens
        return len(choice.token_ids)  # type: ignore[attr-defined]

    async with client:
        return await measure(load, ask)


def in_process(client: Callable[[Load, str], Any], load: Load, url: str, core: int, result: Connection) -> None:
    os.sched_setaffinity(0, {core})
    result.send(asyncio.run(client(load, url)))


def run(load: Load) -> dict[str, tuple[float, float]]:
    """(requests a second, requests a second of processor time) by client; each in a process of its own."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(load, cores[0], sender), daemon=True)
    server.start()
    found: dict[str, tuple[float, float]] = {}
    try:
        url = f"http://127.0.0.1:{receiver.recv()}"
        for name, client in (("vime", vime_client), ("openai", openai_client)):
            answer, give = context.Pipe(duplex=False)
            process = context.Process(target=in_process, args=(client, load, url, cores[-1], give))
            process.start()
            give.close()
            try:
                found[name] = answer.recv()
            finally:
                process.join()
    finally:
        server.terminate()
        server.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4096)
    parser.add_argument("--concurrency", type=int, default=1024)
    parser.add_argument("--long-share", type=float, default=0.02, help="share of answers with --long-tokens tokens")
    parser.add_argument("--long-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    found = run(Load(**vars(arguments)))
    for name, (rate, cpu_rate) in found.items():
        print(f"{name:8s} {rate:8.0f} requests/s   {cpu_rate:8.0f} requests/s of processor time")
    by_clock, by_cpu = (found["vime"][i] / found["openai"][i] for i in (0, 1))
    print(f"ratio    {by_clock:8.1f}              {by_cpu:8.1f}   (both at least {WANTED})")
    return 0 if min(by_clock, by_cpu) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
