"""Weight sync into real vLLM engines: afterwards an engine is what a fresh one is that loads the exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sync.engines import engine, log_probs
from tests.sync.small_models import DEEPSEEK, QWEN3, shards, trained, write_folder
from tests.sync.test_plan import engine as engine_plan
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.sync.plan import make_schedule, receivers_of
from vime.sync.session import Deadlines, Session
from vime.sync.source import WeightSource

pytestmark = pytest.mark.e2e
PROMPTS = [[2, 9, 16, 8, 17, 3], [2, 7, 7, 16, 12, 17, 3]]


class OneRank:
    """The trainer as the session calls it: one rank in this process."""

    def __init__(self, source: WeightSource) -> None:
        self.source = source

    async def __call__(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        return [getattr(self.source, method.removeprefix("weights_"))(*args)]


def source_of(hf: dict[str, Any], tensors: dict[str, torch.Tensor], run: str, buffer: int) -> WeightSource:
    config, layout = ModelConfig.from_hf(hf), ParallelLayout()
    receivers = receivers_of(config, [0], [engine_plan(0, {0: (0,)})])
    schedule = make_schedule(config, layout, [0], receivers, buffer)
    return WeightSource.of_tensors(shards(hf, tensors, layout, 0), schedule, 0, run)


@pytest.mark.parametrize("hf", [DEEPSEEK, QWEN3], ids=["deepseek-v3", "qwen3"])
async def test_after_a_sync_the_engine_equals_one_that_loads_the_exported_weights(
    hf: dict[str, Any], tmp_path: Path
) -> None:
    old, new = trained(hf, 1), trained(hf, 2)
    run = str(tmp_path)
    async with engine(write_folder(tmp_path / "old", hf, old), tmp_path / "old.log") as client:
        first = await client.checksums()
        source = source_of(hf, new, run, 200_000)
        session = Session(source.schedule, [engine_plan(0, {0: (0,)})], OneRank(source), [client], "keep", Deadlines())
        before = [await log_probs(client, prompt) for prompt in PROMPTS]
        metrics = await session.run(7)
        synced = await client.checksums()
        answers = [await log_probs(client, prompt) for prompt in PROMPTS]
        version = await client.weight_info()
        # A second sync goes the same way, over the first one's traces.
        source_again = source_of(hf, old, run, 10**8)
        session.schedule, session.call = source_again.schedule, OneRank(source_again)
        await session.run(8)
        back = await client.checksums()
    assert metrics["sync/buckets"] > 3
    assert version == 7
    async with engine(write_folder(tmp_path / "new", hf, new), tmp_path / "new.log") as client:
        fresh = await client.checksums()
        expected = [await log_probs(client, prompt) for prompt in PROMPTS]
    assert synced == fresh
    assert any(name.endswith("o_proj.packed") for name in fresh)
    assert answers == expected
    assert before != answers
    assert back == first
