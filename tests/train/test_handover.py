"""The order in which GPUs change hands, and what is recorded of it. Trainer and engines are fakes that count bytes."""

import asyncio

import pytest

from tests.support.plans import plan_of
from vime.errors import Cause
from vime.rollout.client import EngineStatus
from vime.sync.ranks import address
from vime.train.handover import EngineStuck, Handover, HandoverDeadlines, described, moved, over_plan

GB = 10**9
TRAINER = {"weights": 10 * GB, "gradients": 20 * GB}
ENGINE = {"weights": 12 * GB, "kv_cache": 40 * GB}


class World:
    """One GPU of 80 GB on each of two nodes; what the trainer and the engines hold there, and on the hosts."""

    def __init__(self, *flags, recipe="tiny-qwen3", asleep=True, deadlines=None):
        self.plan = plan_of(recipe, *flags)
        self.steps, self.said = [], []
        self.trainer, self.engine = set(TRAINER), set() if asleep else set(ENGINE)
        self.host_free = 900 * GB
        self.fails_in, self.hangs = None, False
        self.handover = Handover(
            self.plan, self.call, [self, self], deadlines or HandoverDeadlines(), asleep=asleep, say=self.said.append
        )

    def free(self):
        used = sum(TRAINER[part] for part in self.trainer) + sum(ENGINE[part] for part in self.engine)
        assert used <= 80 * GB, f"{self.trainer} and {self.engine} do not fit"
        return 80 * GB - used

    async def call(self, deadline_s, function, *args):
        _, method = address(function)
        if method == "free_bytes":
            return [(0, self.free(), self.host_free), (1, self.free(), self.host_free)]
        (part,) = args
        self.steps.append(f"{part} {method}")
        if method == "leave":
            self.trainer.discard(part)
            self.host_free -= TRAINER[part] if part == "weights" else 0
        else:
            self.trainer.add(part)
        return [None, None]

    async def sleep(self, level):
        self.steps.append(f"sleep {level}")
        if self.hangs:
            await asyncio.sleep(30)
        self.engine.clear()

    async def wake_up(self, tags):
        self.steps.append(f"wake {tags[0]}")
        if self.fails_in == tags[0]:
            raise EngineStatus("POST /wake_up answered 500: out of memory", 500)
        self.engine.update(tags)


async def a_whole_turn(handover):
    await handover.room_for_weights()
    await handover.weights_come_back()
    await handover.room_for_answers()
    await handover.to_engines()
    await handover.to_trainer()


async def test_gpus_go_round_in_this_order_and_everything_fits_at_every_step():
    world = World()
    await a_whole_turn(world.handover)
    assert world.steps == [
        "gradients leave", "wake weights", "wake weights", "wake kv_cache", "wake kv_cache", "weights leave",
        "sleep 2", "sleep 2", "weights come_back", "gradients come_back",
    ]  # fmt: skip
    assert world.handover.trainer_has_them
    assert world.trainer == {"weights", "gradients"}


async def test_every_step_is_recorded_with_its_time_and_the_bytes_before_and_after():
    world = World()
    await a_whole_turn(world.handover)
    metrics = world.handover.take_metrics()
    steps = ("gradients_leave", "engines_wake_weights", "engines_wake_kv_cache", "weights_leave", "engines_sleep")
    steps += ("weights_come_back", "gradients_come_back")
    assert {f"handover/{step}_time" for step in steps} <= set(metrics)
    assert metrics["handover/gradients_leave_gpu_freed_bytes"] == 20 * GB
    assert metrics["handover/engines_wake_kv_cache_gpu_freed_bytes"] == -40 * GB
    assert metrics["handover/weights_leave_host_taken_bytes"] == 10 * GB
    assert metrics["handover/engines_wake_kv_cache_gpu_free_bytes"] == 18 * GB
    assert world.handover.take_metrics() == {}


async def test_an_engine_restarted_in_a_rollout_is_loaded_while_the_trainer_visits():
    world = World()
    await world.handover.room_for_weights()
    await world.handover.room_for_answers()
    await world.handover.to_engines()
    world.steps.clear()
    world.handover.started(1)
    await world.handover.weights_come_back()
    await world.handover.room_for_answers()
    await world.handover.to_engines()
    assert world.steps == ["weights come_back", "weights leave"]


@pytest.mark.parametrize("dies_in", ["training", "room for weights", "room for answers"])
async def test_nothing_of_the_trainer_is_on_a_gpu_where_an_engine_starts(dies_in):
    """An engine takes its whole share when it starts, so it needs the GPU that it had at the start of the run."""
    world = World()
    if dies_in != "training":
        await world.handover.room_for_weights()
    if dies_in == "room for answers":
        await world.handover.room_for_answers()
    await world.handover.room_to_start()
    assert world.trainer == set()
    world.handover.started(0)
    await world.handover.weights_come_back()
    assert world.trainer == {"weights"}


async def test_with_gpus_of_their_own_nothing_moves():
    world = World("--no-colocate", "--rollout-num-gpus", "1", asleep=False)
    await a_whole_turn(world.handover)
    assert world.steps == []
    assert not world.handover.trainer_has_them
    assert world.handover.take_metrics() == {}


async def test_an_engine_that_cannot_wake_says_what_was_free():
    world = World()
    world.fails_in = "kv_cache"
    await world.handover.room_for_weights()
    with pytest.raises(EngineStuck, match="engine 0 did not sleep or wake: POST /wake_up answered 500") as caught:
        await world.handover.room_for_answers()
    assert caught.value.engine == 0
    assert caught.value.__notes__ == [
        "in the hand-over of GPUs, step engines_wake_kv_cache; free before it: 58.0 GB of a GPU, 900.0 GB of a host"
    ]


async def test_a_step_that_hangs_ends_at_its_deadline():
    world = World(asleep=False, deadlines=HandoverDeadlines(engines=0.05))
    world.hangs, world.trainer = True, set()
    with pytest.raises(EngineStuck, match=r"engine 0 did not sleep or wake within 0 s") as caught:
        await world.handover.to_trainer()
    assert caught.value.cause == Cause.DEADLINE


def test_what_a_host_takes_beyond_the_plan_is_found():
    plan = plan_of("deepseek-r1", nodes=16)
    items = {item.name: item.bytes for item in plan.nodes[3].host_memory.items}
    planned = items["weights_backup"] + items["backup_rounding"]
    before = [(3, 10 * GB, 900 * GB)]
    assert over_plan(plan, "weights_leave", before, [(3, 20 * GB, 900 * GB - planned)]) == {}
    taken = planned + 10 * GB
    assert over_plan(plan, "weights_leave", before, [(3, 20 * GB, 900 * GB - taken)]) == {3: (taken, planned)}
    assert over_plan(plan, "engines_wake_weights", before, [(3, 0, 890 * GB)]) == {3: (10 * GB, 0)}


def test_hosts_without_gpus_are_recorded_too():
    assert moved([(0, None, 5)], [(0, None, 3)]) == {"host_taken_bytes": 2.0, "host_free_bytes": 3.0}
    assert described([(0, None, 3 * GB)]) == "3.0 GB of a host"
