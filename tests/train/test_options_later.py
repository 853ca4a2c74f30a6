"""Effects in a run's processes of options that neither plan nor training shows: limits, seeds, columns, threads."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from typing import Any

import pytest

from tests.support.plans import plan_of
from vime.agents.tool_environment import ToolSettings
from vime.data.rows import Columns
from vime.observe.spikes import SpikeWatch
from vime.recipe.load import load_recipe
from vime.rollout.evaluator import _budget, make_generator
from vime.sync.session import WeightSync
from vime.train.actors import threads_per_rank
from vime.train.driver import Driver

AGENT = ("--environment", "tools", "--tools", "calculator", "python")


@pytest.mark.parametrize(
    ("flag", "value", "field"),
    [
        ("--max-turns", "3", "turns"),
        ("--max-tokens-per-turn", "7", "tokens"),
        ("--turn-timeout", "1.5", "seconds"),
        ("--conversation-timeout", "2.5", "seconds"),
    ],
)
def test_the_budget_of_a_conversation(flag: str, value: str, field: str) -> None:
    """max_turns, max_tokens_per_turn, turn_timeout and conversation_timeout."""
    without, with_it = (_budget(load_recipe("tiny-deepseek-r1", [*AGENT, *more])) for more in ((), (flag, value)))
    assert without != with_it
    assert float(value) in vars(with_it).values()
    assert _budget(load_recipe("tiny-deepseek-r1", [])) != with_it


def test_the_limits_of_a_tool() -> None:
    """tool_memory, tool_timeout and tool_output_characters."""
    flags = ("--tool-memory", "20000000", "--tool-timeout", "4", "--tool-output-characters", "99")
    found = ToolSettings.of(load_recipe("tiny-deepseek-r1", [*AGENT, *flags]).agent)
    assert (found.seconds, found.characters) == (4.0, 99)
    limits = inspect.getclosurevars(found.tools["python"].call).nonlocals["limits"]
    assert (limits.seconds, limits.memory, limits.output) == (4.0, 20000000, 4 * 99)


def test_the_columns_of_the_rows() -> None:
    """input_key, label_key and metadata_key."""
    flags = ("--input-key", "question", "--label-key", "answer", "--metadata-key", "more")
    found = Columns.of(load_recipe("tiny-deepseek-r1", [*flags]))
    assert {"question", "answer", "more"} <= set(vars(found).values())


def test_the_threads_of_a_rank() -> None:
    """num_cpus_per_rank bounds them; a rank's share of the cores does too."""
    plan = plan_of("tiny-deepseek-r1", "--num-cpus-per-rank", "3")
    assert threads_per_rank(plan, 0, cores=64) == 3
    assert threads_per_rank(plan, 0, cores=2) <= 2
    assert threads_per_rank(plan_of("tiny-deepseek-r1"), 0, cores=64) > 3


def test_the_seeds_of_samples() -> None:
    """rollout_sample_seeds and rollout_seed."""
    made: list[Any] = []
    for flags in (("--rollout-seed", "5"), ("--rollout-seed", "5", "--no-rollout-sample-seeds")):
        nothing: Any = None
        made.append(make_generator(plan_of("tiny-deepseek-r1", *flags), nothing, nothing, nothing, {}, None))
    assert [next(v for v in vars(each).values() if type(v).__name__ == "Settings").seed for each in made] == [5, None]


async def test_the_requests_that_an_engine_gets_at_once() -> None:
    """vllm_server_concurrency."""
    driver = Driver.__new__(Driver)
    driver.recipe = load_recipe("tiny-deepseek-r1", ["--vllm-server-concurrency", "3"])
    driver.api_key, driver.exposition = "key", None
    async with contextlib.AsyncExitStack() as stack:
        (client,) = await driver._clients(stack, ["http://127.0.0.1:1"])
        bounds = [value for value in vars(client).values() if isinstance(value, asyncio.Semaphore)]
    assert [bound._value for bound in bounds] == [3]


def test_how_often_a_sync_is_checked() -> None:
    """check_weight_sync."""
    plan = plan_of("tiny-deepseek-r1", "--check-weight-sync", "2")
    nothing: Any = None
    sync = WeightSync(plan, nothing, [], binding=None)
    asked = []

    async def run(version: int, *, check: bool) -> dict[str, float]:
        asked.append(check)
        return {}

    sync._session.run = run  # type: ignore[method-assign]
    for version in range(4):
        _finish(sync.run(version))
    assert asked == [True, False, True, False]


def _finish(coroutine: Any) -> None:
    with pytest.raises(StopIteration):
        coroutine.send(None)


def test_from_where_on_a_value_is_a_spike() -> None:
    """spike_factor."""
    usual = [{"train/grad_norm": 1.0 + 0.01 * (n % 3)} for n in range(30)]
    found = []
    for factor in (2.0, 1e9):
        watch = SpikeWatch(factor)
        for metrics in usual:
            watch.add(metrics)
        found.append(watch.add({"train/grad_norm": 50.0}))
    assert found[0]
    assert not found[1]
