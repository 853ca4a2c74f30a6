"""The driver's protocol against a trainer and engines that record what they are asked, and fail when told to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.support import patience
from tests.support.plans import engine_plan
from tests.support.sync_session import NAMES, RECEIVED, WORKER, FakeEngine, session
from vime.errors import Cause
from vime.sync.session import SyncFailed, worker_infos


async def test_the_order_of_a_sync() -> None:
    sync, trainer, _, journal = session([engine_plan(0, {0: (0,)})])
    metrics = await sync.run(5)
    calls = [name for name, _ in journal]
    engine_calls = [name for name in calls if name.startswith("0:")]
    loads = ["0:update_weights"] * trainer.buckets
    assert engine_calls == [
        "0:pause",
        "0:init_weight_transfer",
        "0:start_update",
        *loads,
        "0:finish_update",
        "0:reset_prefix_cache",
        "0:resume",
    ]
    assert ("0:pause", "keep") in journal
    assert ("0:finish_update", 5) in journal
    assert metrics["sync/buckets"] == trainer.buckets
    assert metrics["sync/bytes"] == 10 * trainer.buckets
    assert calls.index("weights_prepare") < calls.index("0:pause")
    assert calls.index("weights_finish") < calls.index("0:resume")


async def test_a_bucket_is_released_after_it_was_loaded_and_before_its_memory_is_published_again() -> None:
    sync, trainer, _, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    await sync.run(1)
    for bucket in range(trainer.buckets):
        release = journal.index(("weights_release", bucket))
        assert all(journal.index((f"{number}:update_weights", bucket)) < release for number in (0, 1))
        if bucket + 2 < trainer.buckets:
            assert release < journal.index(("weights_publish", bucket + 2))
        if bucket + 1 < trainer.buckets:
            assert journal.index(("weights_publish", bucket + 1)) < release, "gathering and loading overlap"


async def test_engines_are_connected_once_and_again_after_a_restart() -> None:
    sync, _, _, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    await sync.run(1)
    await sync.run(2)
    assert [name for name, _ in journal].count("1:init_weight_transfer") == 1
    replaced: Any = FakeEngine(journal, 7)
    sync.restarted(1, replaced)
    await sync.run(3)
    assert [name for name, _ in journal].count("7:init_weight_transfer") == 1
    assert [name for name, _ in journal].count("0:init_weight_transfer") == 1


async def test_the_draft_is_updated_after_the_policy() -> None:
    sync, _, _, journal = session([engine_plan(0, {0: (0,)})], draft=True)
    await sync.run(1)
    calls = [name for name, _ in journal if name.startswith("0:")]
    assert calls.index("0:start_update") < calls.index("0:start_draft_update")
    assert calls.count("0:finish_update") == 2
    first = next(bucket.index for bucket in sync.schedule.buckets if bucket.target == "draft")
    assert journal.index(("0:start_draft_update", None)) < journal.index(("0:update_weights", first))


@pytest.mark.parametrize("at", [("update_weights", 1), ("finish_update", None), ("start_update", None)])
async def test_a_failure_half_way_names_engine_and_bucket_and_nothing_is_resumed(at: tuple[str, int | None]) -> None:
    sync, _, fakes, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    fakes[1].fails_at = at
    with pytest.raises(SyncFailed) as caught:
        await sync.run(1)
    assert (caught.value.engine, caught.value.bucket) == (1, at[1])
    assert "engine 1" in str(caught.value)
    assert "restart" in str(caught.value)
    names = [name for name, _ in journal]
    assert not [name for name in names if name.endswith(":resume")]
    assert "weights_finish" in names


async def test_engines_of_a_failed_sync_are_loaded_again_only_when_all_were_restarted() -> None:
    sync, _, fakes, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    fakes[1].fails_at = ("update_weights", 0)
    with pytest.raises(SyncFailed):
        await sync.run(1)
    healthy: list[Any] = [FakeEngine(journal, 2), FakeEngine(journal, 3)]
    sync.restarted(1, healthy[1])
    before = len(journal)
    with pytest.raises(SyncFailed, match="engine 0 has not been restarted since a sync failed"):
        await sync.run(1)
    assert not [name for name, _ in journal[before:] if not name.startswith("weights_")]
    sync.restarted(0, healthy[0])
    await sync.run(1)
    assert ("2:resume", None) in journal
    assert ("3:resume", None) in journal


async def test_an_engine_that_hangs_ends_the_sync_at_its_deadline() -> None:
    sync, _, fakes, _ = session([engine_plan(0, {0: (0,)})], deadline=0.2)
    fakes[0].fails_at, fakes[0].hangs = ("update_weights", 0), True
    with pytest.raises(SyncFailed, match="engine 0 did not end update_weights within 0 s") as caught:
        await asyncio.wait_for(sync.run(1), patience.MOMENT)
    assert caught.value.cause == Cause.DEADLINE


async def test_a_check_sends_everything_again_over_zeros_and_compares() -> None:
    sync, trainer, fakes, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    for fake in fakes:
        fake.sums = [{"a": "1", "b": "2"}, {"a": "1", "b": "2", **RECEIVED}]
    metrics = await sync.run(4, check=True)
    names = [name for name, _ in journal if name.startswith("0:")]
    assert names.count("0:update_weights") == 2 * trainer.buckets
    reset = names.index("0:reset_weights")
    assert names[:reset].count("0:update_weights") == names[reset:].count("0:update_weights") == trainer.buckets
    assert names[-1] == "0:resume"
    assert metrics["sync/bytes"] == 2 * 2 * 10 * trainer.buckets


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (
            [{"a": "1"}, {"a": "0", **RECEIVED}],
            [{"a": "1"}, {"a": "1", **RECEIVED}],
            "1 weights of engine 0 differ after",
        ),
        (
            [{"a": "1"}, {"a": "1", **RECEIVED}],
            [{"a": "2"}, {"a": "2", **RECEIVED}],
            "1 weights of engine 1 differ in engine 0, the first is a",
        ),
        (
            [{"a": "1"}, {"a": "1", **RECEIVED}],
            [{"a": "1"}, {"a": "1", **RECEIVED, f"{WORKER}received.{NAMES[3]}": "y"}],
            f"1 weights that dp0:pp0:pcp0:tp0 of engine 1 received differ from the trainer's, the first is {NAMES[3]}",
        ),
        (
            [{"a": "1"}, {"a": "1", **dict(list(RECEIVED.items())[1:])}],
            [{"a": "1"}, {"a": "1", **RECEIVED}],
            f"engine 0 received no {NAMES[0]} and 0 other weights",
        ),
    ],
)
async def test_a_weight_that_does_not_arrive_as_the_trainer_has_it_is_named(first: Any, second: Any, says: str) -> None:
    sync, _, fakes, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    fakes[0].sums, fakes[1].sums = list(first), list(second)
    with pytest.raises(SyncFailed, match=says):
        await sync.run(1, check=True)
    assert not [name for name, _ in journal if name.endswith(":resume")]


async def test_a_trainer_that_is_late_fails_the_sync_too() -> None:
    sync, trainer, _, journal = session([engine_plan(0, {0: (0,)})])
    trainer.late = "weights_publish"
    with pytest.raises(SyncFailed, match="weights_publish did not end") as caught:
        await sync.run(1)
    assert caught.value.engine is None
    assert caught.value.bucket == 0
    assert ("0:resume", None) not in journal


async def test_ranks_that_planned_otherwise_are_found_out_before_an_engine_is_touched() -> None:
    sync, trainer, _, journal = session([engine_plan(0, {0: (0,)})])
    trainer.buckets += 1
    with pytest.raises(SyncFailed, match="buckets, the driver"):
        await sync.run(1)
    assert not [name for name, _ in journal if name.startswith("0:")]


def test_an_engine_on_several_nodes_gets_a_description_for_every_worker() -> None:
    spread = engine_plan(0, {3: (0, 1), 4: (0, 1)}, tensor=2, data=2)
    infos: dict[tuple[int, int | None], Any] = {(3, None): {"segment": "a"}, (4, None): {"segment": "b"}}
    assert [info["segment"] for info in worker_infos(spread, infos)] == ["a", "a", "b", "b"]  # type: ignore[index]
    assert worker_infos(engine_plan(0, {3: (0,)}), infos) == {"segment": "a"}


def test_workers_on_gpus_of_their_own_get_a_description_each() -> None:
    pair = engine_plan(0, {3: (2, 5)}, tensor=2)
    assert worker_infos(pair, {(3, 2): {"handle": "a"}, (3, 5): {"handle": "b"}}) == [{"handle": "a"}, {"handle": "b"}]
