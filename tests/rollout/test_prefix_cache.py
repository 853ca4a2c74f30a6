"""Conversations of many turns on real engines: what was computed for one turn is not computed again for the next."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience, tiny_hf
from tests.support.chat_templates import MARKED, tokenizer_of
from tests.support.engines import engine
from vime.rollout.chat import ChatTemplate
from vime.rollout.client import SamplingSettings
from vime.rollout.counters import parse
from vime.rollout.dispatch import Dispatcher
from vime.rollout.session import Budget, Session, Settings
from vime.samples import Sample

pytestmark = pytest.mark.e2e

CONVERSATIONS, TURNS = 16, 8
BLOCK = 32
"""Tokens of a cache block: the fewest that vLLM takes on processors."""
LONGEST = tiny_hf.QWEN3["max_position_embeddings"]


def words(chance: random.Random, fewest: int, most: int) -> list[int]:
    return [chance.randrange(8, 120) for _ in range(chance.randint(fewest, most))]


async def converse(dispatcher: Dispatcher, settings: Settings, number: int) -> list[tuple[int, int]]:
    """Hold a conversation; by turn the tokens that its request held, and those that it left in the cache."""
    chance = random.Random(number)
    sample = Sample(number, number, "unused", words(chance, 20, 70))
    seat = await dispatcher.take_seat(1)
    session, turns = Session(sample, seat, settings), []
    for _ in range(TURNS):
        asked = sample.length
        await session.generate(max_tokens=chance.randint(4, 24))
        # The last sampled token was never an input, so the engine holds nothing for it.
        turns.append((asked, sample.length - 1))
        await asyncio.sleep(chance.uniform(0, 0.3))
        session.give(words(chance, 4, 28))
    dispatcher.free(seat)
    return turns


def possible(turns: list[tuple[int, int]]) -> int:
    """Tokens that the conversation's requests could find: whole blocks of what the turn before them left. vLLM computes
    the last token of a request in any case."""
    return sum(min(left, asked - 1) // BLOCK * BLOCK for (_, left), (asked, _) in itertools.pairwise(turns))


@pytest.fixture
def _scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for the files that engines leave; a short path, since their sockets are there too."""
    with tempfile.TemporaryDirectory(prefix="vt-") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield


@pytest.mark.usefixtures("_scratch")
async def test_above_95_percent_of_the_hits_that_are_possible(tmp_path: Path) -> None:
    folder = tiny_hf.write_checkpoint(tmp_path / "qwen3", tiny_hf.QWEN3)
    options = ("--max-model-len", str(LONGEST), "--block-size", str(BLOCK), "--max-num-seqs", "16")
    options += ("--skip-tokenizer-init", "--no-enable-chunked-prefill")
    async with contextlib.AsyncExitStack() as stack:
        starts = (stack.enter_async_context(engine(folder, tmp_path / f"log-{n}", *options)) for n in range(2))
        clients = await asyncio.gather(*starts)
        before = [parse(await client.metrics()) for client in clients]
        dispatcher = await stack.enter_async_context(Dispatcher(clients))
        await dispatcher.begin()
        settings = Settings(
            dispatcher,
            ChatTemplate(tokenizer_of(MARKED)),
            SamplingSettings(max_tokens=LONGEST),
            LONGEST,
            patience.ANSWER,
            Budget(turns=TURNS),
        )
        turns = await asyncio.gather(*(converse(dispatcher, settings, number) for number in range(CONVERSATIONS)))
        after = [parse(await client.metrics()) for client in clients]
    queries, hits = (sum(a[name] - b[name] for a, b in zip(after, before, strict=True)) for name in ("queries", "hits"))
    could = sum(map(possible, turns))
    print(f"{hits:.0f} of {queries:.0f} tokens asked for were cached, {hits / could:.1%} of the {could} possible ones")
    assert queries == sum(asked for each in turns for asked, _ in each)
    assert could > queries / 2
    assert hits >= 0.95 * could
