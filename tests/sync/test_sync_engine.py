"""Weight sync into real vLLM engines: afterwards an engine is what a fresh one is that loads the exported folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.engines import engine
from tests.support.fresh_engine import PROMPTS, SPECULATION, fresh
from tests.support.layout_table import DEEPSEEK as DEEPSEEK_LAYOUTS
from tests.support.layout_table import QWEN3 as QWEN3_LAYOUTS
from tests.support.plans import engine_plan
from tests.support.small_models import DEEPSEEK, QWEN3, trained, write_folder
from tests.support.synced import FAR_NODE, MIDDLE, NEW, OLD, Synced
from tests.support.trainer import Held, Trainer
from vime.recipe.parallel import ParallelLayout
from vime.rollout.client import EngineClient, EngineError
from vime.rollout.command import MODEL_NAME
from vime.train.former import settle

pytestmark = pytest.mark.e2e


def layouts(hf: dict[str, Any], table: dict[str, dict[str, Any]]) -> dict[str, ParallelLayout]:
    """The trainer's table for a model of this many layers, and one rank alone."""
    found = {"one": ParallelLayout()}
    for name, options in table.items():
        known = {key: value for key, value in options.items() if key != "sequence_parallel"}
        if hf["num_hidden_layers"] % known.get("pp", 1) and "last_stage_layers" not in known:
            known["first_stage_layers"] = 1
        found[name] = ParallelLayout(**known)
    return found


async def long_answer(client: EngineClient) -> list[tuple[int, int]]:
    """Versions and numbers of tokens of an answer of 150 tokens."""
    body = {
        "model": MODEL_NAME,
        "token_ids": PROMPTS[0],
        "sampling_params": {"max_tokens": 150, "temperature": 1.0, "logprobs": 0, "ignore_eos": True},
    }
    answer = await client._json("POST", "/inference/v1/generate", body, 120)
    return [(int(span["version"]), span["end"] - span["start"]) for span in answer["choices"][0]["weight_versions"]]


async def test_deepseek_with_its_draft_on_two_engines_from_every_layout(tmp_path: Path) -> None:
    """One engine gets its weights through shared memory, one as if on another node, through gloo."""
    hf = DEEPSEEK
    loaded = await fresh(write_folder(tmp_path / "new", hf, trained(hf, NEW)), "--speculate")
    old = write_folder(tmp_path / "old", hf, trained(hf, OLD))
    speculate = ("--speculative-config", json.dumps(SPECULATION))
    plans = (engine_plan(0, {0: (0,)}), engine_plan(1, {FAR_NODE: (0,)}))
    async with contextlib.AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(Trainer(tmp_path))
        starting = [engine(old, tmp_path / f"engine{i}.log", *speculate) for i in range(2)]
        clients = list(await asyncio.gather(*map(stack.enter_async_context, starting)))
        synced = Synced(trainer, Held(hf, MIDDLE, plans, str(tmp_path), draft=True), clients)
        assert (await synced.sync())["sync/buckets"] > 3
        before = await synced.checksums()

        # Requests that are under way when the weights change go on with the new ones and say so.
        asking = asyncio.create_task(long_answer(clients[0]))
        await asyncio.sleep(0.2)
        await synced.sync(seed=NEW)
        spans = await asking
        assert [version for version, _ in spans] == [1, 2]
        assert sum(tokens for _, tokens in spans) == 150

        wanted = loaded["checksums"]
        draft = {name for name in wanted if "draft." in name}
        assert any(name.endswith("o_proj.packed") for name in wanted)
        assert any("experts" in name for name in draft)
        assert all(before[0][name] != wanted[name] for name in draft if name.endswith((".packed", "eh_proj.weight")))
        assert await synced.checksums() == [wanted, wanted]
        assert await synced.answers() == [loaded["answers"]] * 2
        assert [await client.weight_info() for client in clients] == [2, 2]

        for name, layout in layouts(hf, DEEPSEEK_LAYOUTS).items():
            await synced.forget()
            await synced.sync(layout=layout, ranks_per_node=4)
            assert await synced.checksums() == [wanted, wanted], name
        await synced.sync(check=True)
        assert await synced.answers() == [loaded["answers"]] * 2


async def test_qwen3_on_two_replicas_of_an_engine_from_every_layout(tmp_path: Path) -> None:
    """Tied embeddings, two data-parallel replicas in one engine."""
    hf = QWEN3
    loaded = await fresh(write_folder(tmp_path / "new", hf, trained(hf, NEW)))
    old = write_folder(tmp_path / "old", hf, trained(hf, OLD))
    plans = (engine_plan(0, {0: (0, 1)}, data=2),)
    wanted = {
        replica + name.removeprefix("dp0:"): value
        for replica in ("dp0:", "dp1:")
        for name, value in loaded["checksums"].items()
    }
    async with (
        Trainer(tmp_path) as trainer,
        engine(old, tmp_path / "engine.log", "--data-parallel-size", "2") as client,
    ):
        synced = Synced(trainer, Held(hf, NEW, plans, str(tmp_path)), [client])
        assert await synced.checksums() != [wanted]
        for name, layout in layouts(hf, QWEN3_LAYOUTS).items():
            await synced.sync(layout=layout, ranks_per_node=2)
            assert await synced.checksums() == [wanted], name
            await synced.forget()
        await synced.sync(check=True)
        assert await synced.checksums() == [wanted]
        for replica in (0, 1):
            assert await synced.answers(replica) == [loaded["answers"]]
        # A trainer that is gone in the middle of an update is noticed by the next one, which has the engine restarted.
        await client.pause("keep")
        await client.start_update()
        with pytest.raises(EngineError, match="unfinished"):
            await settle(client, sleeps=False)
