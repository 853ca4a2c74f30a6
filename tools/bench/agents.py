"""Cost of conversations of many turns in the driver, against a stub engine that makes tokens at a fixed speed.

    python tools/bench/agents.py [--conversations 1024] [--turns 20] [--tokens 64] [--slots 256] [--turns-per-s 150]

The stub runs in a process of its own; everything else is real: sampler, dispatcher, client, sessions, an environment
whose tool takes a random time, the chat template. Tools take as long as the model's turns on average, so that half of
the conversations always wait for the engine, and a free place in it is work that vime has not sent. Figures:

- idle share: free places of the engine, from when it was first full to the first conversation's end, under 2 %;
- the driver's processor time a turn, at most 1 ms, and beside it that of the bare request of the same tokens, and of a
  turn without its request: the least of several rounds against an engine inside the process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from aiohttp import web
from steady_engine import KEY, SteadyEngine

from vime.agents.environment import Environment, Step
from vime.agents.local import LocalAgent
from vime.agents.ways import environment_way
from vime.planning.build import Checks, make_plan
from vime.planning.cluster import load_cluster
from vime.recipe.load import load_recipe
from vime.recipe.sampling import SamplingSettings
from vime.rollout.chat import ChatTemplate
from vime.rollout.client import EngineClient, Generated
from vime.rollout.dispatch import Dispatcher, Patience
from vime.rollout.sampler import Sampler
from vime.rollout.session import Budget, Session, Settings
from vime.samples import Sample

SAMPLES = 8
CHARACTERS = [chr(code) for code in range(32, 127)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BARE_ROUNDS, ROUNDS_ALONE, CONVERSATIONS_ALONE = 4, 5, 64


@dataclass(frozen=True)
class Load:
    """Parts of the run."""

    conversations: int
    turns: int
    tokens: int
    slots: int
    turn_seconds: float


@dataclass
class WatchedEngine(SteadyEngine):
    """A stub that knows for how long its places were free."""

    present: int = 0
    free_s: float = 0.0
    """Seconds of free places, summed over them, since the first request."""
    looked_at: float = field(default_factory=time.monotonic)

    async def __aenter__(self) -> WatchedEngine:
        await super().__aenter__()
        return self

    def look(self, change: int = 0) -> None:
        now = time.monotonic()
        self.free_s += max(0, self.max_num_seqs - self.present) * (now - self.looked_at)
        self.looked_at, self.present = now, self.present + change

    async def _generate(self, request: web.Request) -> web.Response:
        self.look(1)
        try:
            return await super()._generate(request)
        finally:
            self.look(-1)

    async def _metrics(self, request: web.Request) -> web.Response:
        self.look()
        page = f"bench_free_s {self.free_s}\nbench_present {self.present}\n"
        return web.Response(text=f'vllm:generation_tokens_total{{engine="0"}} {self.generated}\n{page}')


def tokenizer() -> Any:
    """A real tokenizer of characters, with a chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|unk|>"]
    words = {word: number for number, word in enumerate([*special, *CHARACTERS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    roles = {"eos_token": special[0], "unk_token": special[-1], "additional_special_tokens": special[1:-1]}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **roles)
    fast.chat_template = TEMPLATE
    return fast


def serve(load: Load, port: Connection) -> None:
    """The stub's process."""

    async def run() -> None:
        speed = load.tokens / load.turn_seconds
        async with WatchedEngine(load.tokens, speed, load.slots) as stub:
            port.send(stub.port)
            await asyncio.Event().wait()

    asyncio.run(run())


class Tool(Environment):
    """Answers every turn after a random time; done after as many turns as the bench wants."""

    turns, seconds = 20, 1.0
    ended = asyncio.Event()
    made = 0

    def __init__(self) -> None:
        self.left = Tool.turns

    async def step(self, message: Any) -> Step:
        self.left -= 1
        Tool.made += 1
        if not self.left:
            Tool.ended.set()
            return Step(done=True, reward=random.random())
        with self.session.tool("sleep"):
            await asyncio.sleep(random.expovariate(1 / Tool.seconds))
        return Step([{"role": "tool", "content": "0123456789" * 3, "name": "sleep"}])


@contextlib.asynccontextmanager
async def client_of(load: Load) -> AsyncIterator[EngineClient]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(load, sender), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{receiver.recv()}"
        async with EngineClient(url, KEY, concurrency=load.conversations) as client:
            yield client
    finally:
        server.terminate()
        server.join()


def sampler_of(folder: Path, load: Load, client: EngineClient, agent: LocalAgent) -> Sampler:
    prompts = str(folder / "prompts.jsonl")
    groups = str(load.conversations // SAMPLES)
    flags = ["--prompt-data", prompts, "--eval-prompt-data", "none", prompts, "--rm-type", "f1"]
    flags += ["--rollout-batch-size", groups, "--over-sampling-batch-size", groups, "--num-steps-per-rollout", "1"]
    flags += ["--n-samples-per-prompt", str(SAMPLES), "--dynamic-sampling-filter-path", "none", "--no-rollout-shuffle"]
    flags += ["--environment", "bench_agents:Tool", "--max-turns", str(load.turns)]
    flags += ["--rollout-max-response-len", "100000", "--vllm-max-model-len", "110000"]
    plan = make_plan(
        load_recipe("tiny-tools", flags),
        cluster=load_cluster("local"),
        nodes=1,
        base_dir=folder,
        run_dir=folder,
        checks=Checks(inputs=False, run_folder=False),
    )
    return Sampler(plan, [client], patience=Patience(stall=600), tokenizer=tokenizer(), agent=agent)


async def watched(client: EngineClient) -> dict[str, float]:
    page = await client.metrics()
    return {name: float(value) for name, value in (line.split() for line in page.splitlines() if line[:5] == "bench")}


async def bare_request_ms(client: EngineClient, load: Load) -> float:
    """Processor time of the same number of requests without a conversation, for histories of half the length."""
    ids = [49] * (load.turns * (load.tokens + 40) // 2)
    settings = SamplingSettings(max_tokens=load.tokens)
    waiting = asyncio.Semaphore(load.slots)

    async def one() -> None:
        async with waiting:
            await client.generate(ids, settings, deadline_s=600)

    started = time.process_time()
    count = BARE_ROUNDS * load.slots
    await asyncio.gather(*(one() for _ in range(count)))
    return 1000 * (time.process_time() - started) / count


class OwnEngine:
    """Answers inside the process, at once."""

    def __init__(self, load: Load) -> None:
        self.concurrency, self._tokens = CONVERSATIONS_ALONE, load.tokens

    async def generate(self, *_: Any, **__: Any) -> Generated:
        await asyncio.sleep(0)
        tokens = self._tokens
        return Generated([49] * tokens, [-0.25] * tokens, [0] * tokens, "stop")

    async def weight_info(self) -> int:
        return 0

    async def metrics(self) -> str:
        return ""


async def alone_ms(load: Load) -> float:
    """Processor time of a turn without its request."""
    Tool.turns, Tool.seconds = load.turns, 1e-4
    way, best = environment_way("bench_agents:Tool"), float("inf")
    async with Dispatcher([cast(Any, OwnEngine(load))]) as dispatcher:
        await dispatcher.begin()
        sampling, budget = SamplingSettings(max_tokens=100_000), Budget(turns=load.turns)
        settings = Settings(dispatcher, ChatTemplate(tokenizer()), sampling, 110_000, 600.0, budget, seed=1)

        async def one(number: int) -> None:
            seat = await dispatcher.take_seat(1)
            chat = [{"role": "user", "content": f"{number}+0="}]
            await way.hold(Session(Sample(number, number, chat, settings.template.prompt(chat)), seat, settings))
            dispatcher.free(seat)

        for _ in range(ROUNDS_ALONE):
            started = time.process_time()
            await asyncio.gather(*(one(number) for number in range(CONVERSATIONS_ALONE)))
            best = min(best, time.process_time() - started)
    return 1000 * best / (CONVERSATIONS_ALONE * load.turns)


async def measure(folder: Path, load: Load) -> bool:
    alone = await alone_ms(load)
    Tool.turns, Tool.seconds, Tool.ended, Tool.made = load.turns, load.turn_seconds, asyncio.Event(), 0
    async with client_of(load) as client, LocalAgent(environment_way("bench_agents:Tool")) as agent:
        bare = await bare_request_ms(client, load)
        async with sampler_of(folder, load, client, agent) as sampler:
            processor, clock = time.process_time(), time.monotonic()
            rollout = asyncio.create_task(sampler.generate(0))
            while (await watched(client))["bench_present"] < load.slots and not rollout.done():  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            full, full_at = await watched(client), time.monotonic()
            await asyncio.wait([rollout, asyncio.ensure_future(Tool.ended.wait())], return_when="FIRST_COMPLETED")
            end, ended_at = await watched(client), time.monotonic()
            metrics = (await rollout).metrics
            seconds, processor = time.monotonic() - clock, time.process_time() - processor
    turns = Tool.made
    idle = (end["bench_free_s"] - full["bench_free_s"]) / (load.slots * (ended_at - full_at))
    ms = 1000 * processor / turns
    print(f"{load.conversations} conversations, {turns} turns in {seconds:.1f} s; full for {ended_at - full_at:.1f} s")
    print(f"given share {metrics['rollout/given_share']:.2f}, tool time {metrics['perf/tool_time']:.1f} s each")
    print(f"engine's places free {idle:.2%} (under 2 %)")
    print(f"driver's processor time {ms:.2f} ms a turn (at most 1), {ms / bare:.2f} x a bare request's {bare:.2f} ms")
    print(f"a turn without its request, nothing beside it: {alone:.2f} ms")
    return idle < 0.02 and ms <= 1.0


def write_inputs(folder: Path) -> None:
    rows = ({"prompt": [{"role": "user", "content": f"{n}+0="}], "label": "x"} for n in range(2000))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.modules["bench_agents"] = sys.modules[__name__]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a turn")
    parser.add_argument("--slots", type=int, default=256, help="turns that the engine makes at once")
    parser.add_argument("--turns-per-s", type=float, default=150, help="of the engine")
    options = parser.parse_args()
    seconds = options.slots / options.turns_per_s
    load = Load(options.conversations, options.turns, options.tokens, options.slots, seconds)
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name))
        return 0 if asyncio.run(measure(Path(name), load)) else 1


if __name__ == "__main__":
    sys.exit(main())
