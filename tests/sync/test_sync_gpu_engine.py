"""Weight sync into real vLLM engines on GPUs, in block fp8 as DeepSeek's checkpoint has it: afterwards an engine is
what a fresh one is that loads the quantised folder.

The GPUs should be free: vLLM checks what is left of their memory when an engine goes to sleep.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import engine, log_probs
from tests.support.fresh_engine import PROMPTS, SPECULATION
from tests.support.plans import engine_plan
from tests.support.small_models import DEEPSEEK, QWEN3, trained, write_folder
from tests.support.synced import FAR_NODE, MIDDLE, NEW, OLD, Synced
from tests.support.trainer import Held, Trainer
from vime.recipe.parallel import ParallelLayout
from vime.rollout.client import EngineClient
from vime.train.handover import SLEEP_LEVEL

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

# Matrices of whole blocks for two tensor-parallel workers, and head sizes that the attention of GPUs knows.
FP8_DEEPSEEK = {
    **DEEPSEEK, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": 128, "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 256,
}  # fmt: skip
HALF_QWEN3 = {**QWEN3, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FIRST = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
"""The GPU that a process of the tests sees first, as its engines have to be told."""
SMALL = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "268435456", "--enable-sleep-mode")


@pytest.fixture(autouse=True)
def on_this_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


async def started(stack: contextlib.AsyncExitStack, *engines: Any) -> list[EngineClient]:
    return list(await asyncio.gather(*map(stack.enter_async_context, engines)))


async def answers(client: EngineClient) -> list[tuple[list[int], list[float]]]:
    return [await log_probs(client, prompt) for prompt in PROMPTS]


def assert_same_answers(found: Sequence[Any], wanted: Sequence[Any]) -> None:
    for (tokens, values), (wanted_tokens, wanted_values) in zip(found, wanted, strict=True):
        assert tokens == wanted_tokens
        assert values == pytest.approx(wanted_values, abs=1e-4)


async def test_an_engine_that_dropped_its_weights_asleep_is_a_fresh_one_after_the_sync(tmp_path: Path) -> None:
    """DeepSeek in block fp8 with its draft, on the trainer's GPU. Asleep the engine gives its weights' memory back and
    copies none of them to the host; buffers and scales that no sync brings have to survive."""
    hf = FP8_DEEPSEEK
    new = write_folder(tmp_path / "new", hf, trained(hf, NEW), in_fp8=True)
    old = write_folder(tmp_path / "old", hf, trained(hf, OLD), in_fp8=True)
    options = (*SMALL, "--speculative-config", json.dumps(SPECULATION))
    async with contextlib.AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(Trainer(tmp_path, 1))
        fresh = await stack.enter_async_context(
            engine(new, tmp_path / "fresh.log", *options, backend="vime", gpus=FIRST)
        )
        wanted, wanted_answers = await fresh.checksums(), await answers(fresh)
        held = Held(hf, MIDDLE, (engine_plan(0, {0: (0,)}),), str(tmp_path), draft=True, gpus=(0,))
        client = await stack.enter_async_context(
            engine(old, tmp_path / "engine.log", *options, backend="vime", gpus=FIRST)
        )
        synced = Synced(trainer, held, [client])
        # Asleep before any sync, as at a run's start, and between two of them.
        for seed in (MIDDLE, NEW):
            await client.sleep(SLEEP_LEVEL)
            await client.wake_up(["weights"])
            await synced.sync(seed=seed)
            await client.wake_up(["kv_cache"])
        assert await synced.checksums() == [wanted]
        assert_same_answers(await answers(client), wanted_answers)


@two_gpus
async def test_an_engine_on_the_trainers_gpu_and_one_on_its_own(tmp_path: Path) -> None:
    """DeepSeek in block fp8 with its draft. One engine maps the trainer's memory, to the other buckets go by NCCL."""
    hf = FP8_DEEPSEEK
    new = write_folder(tmp_path / "new", hf, trained(hf, NEW), in_fp8=True)
    old = write_folder(tmp_path / "old", hf, trained(hf, OLD), in_fp8=True)
    options = (*SMALL, "--speculative-config", json.dumps(SPECULATION))
    plans = (engine_plan(0, {0: (0,)}), engine_plan(1, {FAR_NODE: (0,)}))
    async with contextlib.AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(Trainer(tmp_path, 1))
        fresh, *clients = await started(
            stack,
            engine(new, tmp_path / "fresh.log", *options, backend="vime", gpus="1"),
            engine(old, tmp_path / "engine0.log", *options, backend="vime", gpus="0"),
            engine(old, tmp_path / "engine1.log", *options, backend="vime", gpus="1"),
        )
        wanted, wanted_answers = await fresh.checksums(), await answers(fresh)
        assert any("draft." in name for name in wanted)
        assert any("weight_scale_inv" in name for name in wanted)
        synced = Synced(trainer, Held(hf, MIDDLE, plans, str(tmp_path), draft=True, gpus=(0,)), clients)
        assert (await synced.sync())["sync/buckets"] > 3
        assert all(found != wanted for found in await synced.checksums())

        # As a run of shared GPUs does it: asleep while the trainer works, its weights back for the sync.
        for client in clients:
            await client.sleep(SLEEP_LEVEL)
            await client.wake_up(["weights"])
        await synced.sync(seed=NEW)
        for client in clients:
            await client.wake_up(["kv_cache"])
        assert await synced.checksums() == [wanted, wanted]
        for client in clients:
            assert_same_answers(await answers(client), wanted_answers)
        await synced.forget()
        await synced.sync(check=True)
        assert await synced.checksums() == [wanted, wanted]


@two_gpus
@pytest.mark.parametrize(
    ("hf", "sizes", "flags"),
    [
        (FP8_DEEPSEEK, {"data": 2, "expert_parallel": True}, ("--data-parallel-size", "2", "--enable-expert-parallel")),
        (FP8_DEEPSEEK, {"tensor": 2}, ("--tensor-parallel-size", "2")),
        (HALF_QWEN3, {"tensor": 2}, ("--tensor-parallel-size", "2")),
    ],
    ids=["deepseek-ep2", "deepseek-tp2", "qwen3-tp2"],
)
async def test_two_workers_on_the_gpus_of_two_ranks(
    tmp_path: Path, hf: dict[str, Any], sizes: dict[str, Any], flags: tuple[str, ...]
) -> None:
    """From every layout of two ranks; boxes go between the GPUs by NCCL, buckets are mapped."""
    in_fp8 = "quantization_config" in hf
    new = write_folder(tmp_path / "new", hf, trained(hf, NEW), in_fp8=in_fp8)
    old = write_folder(tmp_path / "old", hf, trained(hf, OLD), in_fp8=in_fp8)
    layouts = {"pp2": ParallelLayout(2, pp=2, first_stage_layers=1), "tp2": ParallelLayout(2, tp=2)}
    if in_fp8:
        layouts |= {"ep2": ParallelLayout(2, ep=2), "etp2": ParallelLayout(2, tp=2, etp=2)}
    plans = (engine_plan(0, {0: (0, 1)}, **sizes),)
    async with contextlib.AsyncExitStack() as stack:
        trainer = await stack.enter_async_context(Trainer(tmp_path, 2))
        fresh, client = await started(
            stack,
            engine(new, tmp_path / "fresh.log", *SMALL, *flags, backend="vime", gpus="0,1"),
            engine(old, tmp_path / "engine.log", *SMALL, *flags, backend="vime", gpus="0,1"),
        )
        wanted, wanted_answers = await fresh.checksums(), await answers(fresh)
        synced = Synced(trainer, Held(hf, MIDDLE, plans, str(tmp_path), layouts["pp2"], gpus=(0, 1)), [client])
        await synced.sync()
        assert await synced.checksums() != [wanted]
        for name, layout in layouts.items():
            await synced.sync(layout=layout, seed=NEW)
            assert await synced.checksums() == [wanted], name
            await synced.forget()
        await synced.sync(check=True)
        assert await synced.checksums() == [wanted]
        assert_same_answers(await answers(client), wanted_answers)
