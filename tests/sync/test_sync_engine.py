"""Weight sync into real vLLM engines: afterwards an engine is what a fresh one is that loads the exported folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.sync.engines import engine, log_probs
from tests.sync.small_models import DEEPSEEK, QWEN3, Tensors, shards, trained, write_folder
from tests.sync.test_plan import engine as engine_plan
from vime.models.config import ModelConfig
from vime.planning.types import EnginePlan
from vime.recipe.parallel import ParallelLayout
from vime.rollout.client import EngineClient
from vime.rollout.command import MODEL_NAME
from vime.sync.plan import make_schedule, receivers_of
from vime.sync.session import Deadlines, Session
from vime.sync.source import WeightSource

pytestmark = pytest.mark.e2e
PROMPTS = [[2, 9, 16, 8, 17, 3], [2, 7, 7, 16, 12, 17, 3]]


class OneRank:
    """The trainer as the session calls it: one rank in this process, on threads, as the engines run beside it."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source

    async def __call__(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        return [await asyncio.to_thread(getattr(self.source, method.removeprefix("weights_")), *args)]


def source_of(
    hf: dict[str, Any], tensors: Tensors, engines: list[EnginePlan], run: str, buffer: int, **more: Any
) -> WeightSource:
    """A trainer of one rank on node 0."""
    config, layout = ModelConfig.from_hf(hf), ParallelLayout()
    schedule = make_schedule(config, layout, [0], receivers_of(config, [0], engines), buffer, **more)
    return WeightSource.of_tensors(shards(hf, tensors, layout, 0), schedule, 0, run)


def session_of(source: WeightSource, engines: list[EnginePlan], clients: list[EngineClient]) -> Session:
    nodes = max(node for engine in engines for node in engine.nodes) + 1
    return Session(source.schedule, engines, OneRank(source), clients, "keep", Deadlines(), ["127.0.0.1"] * nodes)


async def long_answer(client: EngineClient) -> list[tuple[int, int]]:
    """Versions and numbers of tokens of an answer of 150 tokens."""
    body = {
        "model": MODEL_NAME,
        "token_ids": PROMPTS[0],
        "sampling_params": {"max_tokens": 150, "temperature": 1.0, "logprobs": 0, "ignore_eos": True},
    }
    answer = await client._json("POST", "/inference/v1/generate", body, 120)
    return [(int(span["version"]), span["end"] - span["start"]) for span in answer["choices"][0]["weight_versions"]]


async def test_two_engines_near_and_far_equal_one_that_loads_the_exported_weights(tmp_path: Path) -> None:
    """DeepSeek-V3: one engine gets its weights through shared memory, one as if on another node, through gloo."""
    hf, middle, new = DEEPSEEK, trained(DEEPSEEK, 2), trained(DEEPSEEK, 3)
    folder = write_folder(tmp_path / "old", hf, trained(hf, 1))
    plans = [engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})]
    async with contextlib.AsyncExitStack() as stack:
        starting = [engine(folder, tmp_path / f"old{i}.log") for i in range(2)]
        clients = list(await asyncio.gather(*map(stack.enter_async_context, starting)))
        first = await clients[0].checksums()
        source = source_of(hf, middle, plans, str(tmp_path), 200_000)
        session = session_of(source, plans, clients)
        metrics = await session.run(6)
        assert metrics["sync/buckets"] > 3
        between = await log_probs(clients[0], PROMPTS[0])

        # Requests that are under way when the weights change go on with the new ones and say so.
        asking = asyncio.create_task(long_answer(clients[0]))
        await asyncio.sleep(0.2)
        source._tensors = shards(hf, new, ParallelLayout(), 0)
        await session.run(7)
        spans = await asking
        assert [version for version, _ in spans] == [6, 7]
        assert sum(tokens for _, tokens in spans) == 150

        synced = [await client.checksums() for client in clients]
        answers = [[await log_probs(client, prompt) for prompt in PROMPTS] for client in clients]
        assert [await client.weight_info() for client in clients] == [7, 7]
    async with engine(write_folder(tmp_path / "new", hf, new), tmp_path / "new.log") as client:
        fresh = await client.checksums()
        expected = [await log_probs(client, prompt) for prompt in PROMPTS]
    assert any(name.endswith("o_proj.packed") for name in fresh)
    assert synced == [fresh, fresh]
    assert answers == [expected, expected]
    assert first != fresh
    assert between != expected[0]


async def test_both_replicas_of_an_engine_equal_one_that_loads_the_exported_weights(tmp_path: Path) -> None:
    """Qwen3 with tied embeddings, two data-parallel replicas in one engine."""
    hf, old, new = QWEN3, trained(QWEN3, 1), trained(QWEN3, 2)
    folder = write_folder(tmp_path / "old", hf, old)
    plans = [engine_plan(0, {0: (0, 1)}, data=2)]
    async with engine(folder, tmp_path / "old.log", "--data-parallel-size", "2") as client:
        first = await client.checksums()
        source = source_of(hf, new, plans, str(tmp_path), 200_000)
        session = session_of(source, plans, [client])
        await session.run(7)
        synced = await client.checksums()
        answers = [await log_probs(client, prompt, replica=replica) for replica in (0, 1) for prompt in PROMPTS]
        source._tensors = shards(hf, old, ParallelLayout(), 0)
        await session.run(8, check=True)
        back = await client.checksums()
    async with engine(write_folder(tmp_path / "new", hf, new), tmp_path / "new.log") as client:
        fresh = await client.checksums()
        expected = [await log_probs(client, prompt) for prompt in PROMPTS]
    assert back == first
    for replica in ("dp0:", "dp1:"):
        of_replica = {name.removeprefix(replica): value for name, value in synced.items() if name.startswith(replica)}
        assert of_replica == {name.removeprefix("dp0:"): value for name, value in fresh.items()}
    assert answers == expected * 2


async def test_the_mtp_draft_is_updated_too(tmp_path: Path) -> None:
    """DeepSeek-V3 that speculates with its own MTP layer: the draft's weights follow, and guesses are accepted."""
    hf, new = DEEPSEEK, trained(DEEPSEEK, 2)
    speculate = ("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 1}))
    plans = [engine_plan(0, {0: (0,)})]
    async with engine(write_folder(tmp_path / "old", hf, trained(hf, 1)), tmp_path / "old.log", *speculate) as client:
        first = await client.checksums()
        source = source_of(hf, new, plans, str(tmp_path), 200_000, draft=True, mtp_trained=True)
        await session_of(source, plans, [client]).run(3, check=True)
        synced = await client.checksums()
        answers = [await log_probs(client, prompt) for prompt in PROMPTS]
    async with engine(write_folder(tmp_path / "new", hf, new), tmp_path / "new.log", *speculate) as client:
        fresh = await client.checksums()
        expected = [await log_probs(client, prompt) for prompt in PROMPTS]
    draft = {name for name in fresh if "draft." in name}
    assert any("experts" in name for name in draft)
    assert all(first[name] != fresh[name] for name in draft if name.endswith((".packed", "eh_proj.weight")))
    assert synced == fresh
    assert answers == expected
