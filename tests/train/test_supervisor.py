"""Handling of engines that fail, in a rollout or in a sync. Engines, processes, sync and trainer are fakes here;
tests/e2e/test_engine_faults.py kills real ones."""

import asyncio

import pytest
from ray.exceptions import RayTaskError

from tests.support import patience
from tests.support.fake_engine import FakeEngine
from tests.support.plans import plan_of
from vime.errors import Cause, DeadlineExceeded, VimeError
from vime.rollout.client import EngineAnswer, EngineTimeout, EngineUnreachable
from vime.sync.ranks import WorkerMethods
from vime.sync.session import SyncFailed
from vime.train.handover import EngineStuck
from vime.train.supervisor import EngineLost, EngineSupervisor, RecoveryDeadlines
from vime.train.trust import EngineDistrusted


class World:
    """Two engines, their processes, the sync and the trainer; `journal` has what was done in order."""

    def __init__(self, *flags, sync_faults=(), trainer_off=0.0):
        self.plan = plan_of("tiny-qwen3", *flags)
        self.journal, self.said = [], []
        self.engines = [FakeEngine(version=-1), FakeEngine(version=-1)]
        self.sync_faults = list(sync_faults)
        self.trainer_off = trainer_off
        self.start_faults, self.turns, self.turn_faults = [], [], {}
        self.ends = []
        self.broken = set()
        for number, engine in enumerate(self.engines):
            engine.generate = self._answer(number, engine.generate)
        self.supervisor = EngineSupervisor(
            self.plan, self, self.engines, self, self.call, self, [[1, 2]], RecoveryDeadlines(probe=1), self.said.append
        )

    def _answer(self, number, generate):
        async def answer(*args, **kwargs):
            if number in self.broken:
                raise EngineTimeout(f"engine {number} did not answer")
            return await generate(*args, **kwargs)

        return answer

    async def restart(self, engines, *, deadline_s):
        self.journal.append(("restart", *engines))
        if self.start_faults:
            raise self.start_faults.pop(0)
        for engine in engines:
            self.engines[engine].version = -1
        self.broken -= set(engines)

    async def exited(self):
        return self.ends

    async def run(self, version):
        self.journal.append(("sync", version))
        await asyncio.sleep(0)
        if self.sync_faults and (fault := self.sync_faults.pop(0)) is not None:
            raise fault
        for engine in self.engines:
            engine.version = version
        return {"sync/bytes": 1.0}

    def restarted(self, engine, client):
        assert client is self.engines[engine]
        self.journal.append(("restarted", engine))

    # The hand-over, as far as the supervisor drives it; tests/train/test_handover.py shows its own steps.

    trainer_has_them = False

    async def turn(self, step):
        self.turns.append(step)
        if (fault := self.turn_faults.pop(step, None)) is not None:
            raise fault

    async def room_for_weights(self):
        await self.turn("room for weights")

    async def weights_come_back(self):
        await self.turn("weights come back")

    async def room_for_answers(self):
        await self.turn("room for answers")

    async def to_engines(self):
        await self.turn("to engines")

    async def room_to_start(self):
        await self.turn("room to start")

    async def to_trainer(self):
        await self.turn("to trainer")

    def started(self, engine):
        self.turns.append(f"engine {engine} started")

    def take_metrics(self):
        return {"handover/time": 1.0}

    async def call(self, deadline_s, function, sequences):
        assert function is WorkerMethods.log_probs
        self.journal.append(("log_probs", len(sequences)))
        return [[[-0.5 - self.trainer_off, -1.0 - self.trainer_off] for _ in sequences]] * 2


def failed(engine):
    return SyncFailed("update_weights answered 500", engine=engine, bucket=1, cause=Cause.CODE_ERROR)


async def test_after_every_sync_all_engines_are_compared_with_the_trainer():
    world = World(trainer_off=0.01)
    metrics = await world.supervisor.sync()
    assert world.journal == [("sync", 0), ("log_probs", 2)]
    assert metrics["sync/train_rollout_logprob_abs_diff"] == pytest.approx(0.01)
    assert metrics["sync/engine_restarts"] == 0


async def test_engines_that_never_agree_with_the_trainer_end_the_run_at_the_start():
    world = World(trainer_off=1.3)
    with pytest.raises(EngineDistrusted, match=r"engine 0 gives log-probs that differ from the trainer's by 1\.3 nat"):
        await world.supervisor.sync()
    assert ("restart", 0) not in world.journal


async def test_an_engine_that_loses_trust_is_restarted_loaded_whole_and_compared_again():
    world = World()
    await world.supervisor.sync()
    world.journal.clear()
    world.engines[1].off = 2.0
    mend = world.restart

    async def restart(engines, *, deadline_s):
        await mend(engines, deadline_s=deadline_s)
        world.engines[1].off = 0.0

    world.restart = restart
    metrics = await world.supervisor.sync()
    assert world.journal == [
        ("sync", 0), ("log_probs", 2), ("restart", 1), ("restarted", 1), ("sync", 0), ("log_probs", 2),
    ]  # fmt: skip
    assert metrics["sync/engine_restarts"] == 1


async def test_after_a_failed_sync_no_engine_serves_before_it_was_restarted_and_loaded_whole():
    world = World(sync_faults=[failed(1)])
    metrics = await world.supervisor.sync()
    assert world.journal[:5] == [("sync", 0), ("restart", 0, 1), ("restarted", 0), ("restarted", 1), ("sync", 0)]
    assert metrics["sync/engine_restarts"] == 2
    assert "update_weights answered 500" in world.said[0]


async def test_a_sync_that_fails_on_the_trainers_side_ends_the_run():
    world = World(sync_faults=[failed(None)])
    with pytest.raises(SyncFailed):
        await world.supervisor.sync()
    assert world.journal == [("sync", 0)]


async def test_an_engine_that_fails_too_often_ends_the_run_with_the_cause():
    world = World("--max-engine-restarts", "2", sync_faults=[failed(1)] * 3)
    with pytest.raises(EngineLost, match=r"engine 1 failed 3 times within one rollout.*answered 500") as caught:
        await world.supervisor.sync()
    assert caught.value.cause == Cause.CODE_ERROR
    assert [entry[0] for entry in world.journal].count("restart") == 2


async def test_a_start_that_fails_in_an_actor_ends_the_run_with_the_cause_inside_rays_wrapper():
    world = World("--max-engine-restarts", "1")
    await world.supervisor.sync()
    inner = EngineStuck("engine 1 ran out of memory", 1, Cause.OUT_OF_MEMORY)
    world.start_faults = [RayTaskError("start", "traceback", inner).as_instanceof_cause()]
    world.broken = {1}
    with pytest.raises(EngineLost) as caught:
        await world.supervisor.recover(1, EngineUnreachable("engine 1 exited with -9"))
    assert caught.value.cause is Cause.OUT_OF_MEMORY


async def test_failures_of_earlier_rollouts_do_not_count():
    world = World("--max-engine-restarts", "1", sync_faults=[failed(1), None, failed(1), None])
    for version in (0, 1):
        world.supervisor.version = version
        await world.supervisor.sync()


async def test_a_start_that_fails_is_tried_again_and_counts():
    world = World("--max-engine-restarts", "2")
    await world.supervisor.sync()
    world.start_faults = [DeadlineExceeded("engine 1 was not ready within 1800 s")]
    world.broken = {1}
    await world.supervisor.recover(1, EngineUnreachable("engine 1 exited with -9"))
    assert [entry for entry in world.journal if entry[0] == "restart"] == [("restart", 1)] * 2
    await world.supervisor.sync()
    world.start_faults = [DeadlineExceeded("engine 1 was not ready within 1800 s")] * 2
    world.broken = {1}
    with pytest.raises(EngineLost, match="engine 1 was not ready") as caught:
        await world.supervisor.recover(1, EngineUnreachable("engine 1 exited with -9"))
    assert caught.value.cause == Cause.DEADLINE


async def test_an_engine_of_which_only_a_connection_broke_is_not_restarted():
    world = World()
    await world.supervisor.sync()
    world.journal.clear()
    await world.supervisor.recover(0, EngineUnreachable("connection reset"))
    assert world.journal == []


@pytest.mark.parametrize("error", [EngineUnreachable("exited with -9"), EngineTimeout("made no token in 300 s")])
async def test_an_engine_that_does_not_answer_is_restarted_synced_and_alone_compared(error):
    world = World()
    world.supervisor.version = 4
    await world.supervisor.sync()
    world.journal.clear()
    world.broken = {1}
    await world.supervisor.recover(1, error)
    assert world.journal == [("restart", 1), ("restarted", 1), ("sync", 4), ("log_probs", 1)]


async def test_an_engine_that_answers_wrong_is_restarted_though_it_answers():
    world = World()
    await world.supervisor.sync()
    await world.supervisor.recover(0, EngineAnswer("answer has 2 tokens and 1 log-probs"))
    assert ("restart", 0) in world.journal


async def test_a_recovery_waits_for_its_turn_at_the_trainer_and_loads_what_was_trained():
    world = World()
    await world.supervisor.sync()
    world.journal.clear()
    world.broken = {0}
    async with world.supervisor.turn:
        recovery = asyncio.create_task(world.supervisor.recover(0, EngineUnreachable("exited with -9")))
        await asyncio.sleep(0.05)
        assert world.journal == [("restart", 0), ("restarted", 0)]
        world.supervisor.version = 1
    await recovery
    assert world.journal[2:] == [("sync", 1), ("log_probs", 1)]


async def test_a_process_that_ended_is_reported(monkeypatch):
    monkeypatch.setattr("vime.train.supervisor.POLL_SECONDS", 0.01)
    world = World()
    world.ends = [(1, "exited with -9: Killed")]
    reported = asyncio.Queue()
    watch = asyncio.create_task(world.supervisor.watch(lambda engine, error: reported.put_nowait((engine, error))))
    engine, error = await asyncio.wait_for(reported.get(), patience.MOMENT)
    watch.cancel()
    assert engine == 1
    assert isinstance(error, VimeError)
    assert "exited with -9" in str(error)


async def test_a_sync_hands_the_gpus_to_the_engines_step_by_step():
    world = World()
    metrics = await world.supervisor.sync()
    assert world.turns == ["room for weights", "weights come back", "room for answers", "to engines"]
    assert metrics["handover/time"] == 1.0


async def test_an_engine_restarted_in_a_rollout_gets_its_weights_while_the_trainer_is_back_for_it():
    world = World()
    await world.supervisor.sync()
    world.turns.clear()
    world.broken = {1}
    await world.supervisor.recover(1, EngineUnreachable("exited with -9"))
    assert world.turns == ["room to start", "engine 1 started", "weights come back", "room for answers", "to engines"]


async def test_an_engine_that_died_since_the_last_sync_is_restarted_before_the_next():
    world = World()
    await world.supervisor.sync()
    world.journal.clear()
    world.ends = [(1, "exited with -9: Killed")]
    await world.supervisor.sync()
    assert world.journal[:3] == [("restart", 1), ("restarted", 1), ("sync", 0)]


@pytest.mark.parametrize("step", ["to trainer", "room for weights", "room for answers"])
async def test_an_engine_that_neither_sleeps_nor_wakes_is_restarted_and_the_step_repeated(step):
    world = World()
    await world.supervisor.sync()
    world.turns.clear()
    world.turn_faults = {step: EngineStuck("engine 0 did not sleep or wake: no connection", 0, Cause.CODE_ERROR)}
    await world.supervisor.to_trainer()
    await world.supervisor.sync()
    assert world.turns.count("engine 0 started") == 1
    assert world.turns[world.turns.index("engine 0 started") - 1] == "room to start"
    assert world.turns.count(step) == 2
    assert world.turns[-1] == "to engines"


async def test_an_engine_that_never_sleeps_ends_the_run():
    world = World("--max-engine-restarts", "0")
    await world.supervisor.sync()
    world.turn_faults = {"to trainer": EngineStuck("engine 0 did not sleep", 0, Cause.DEADLINE)}
    with pytest.raises(EngineLost, match="did not sleep") as caught:
        await world.supervisor.to_trainer()
    assert caught.value.cause == Cause.DEADLINE
