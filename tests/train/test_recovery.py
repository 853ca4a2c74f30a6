"""Sampler, dispatcher, supervisor and sync together: what an engine's failure does to a rollout, and to a sync.

Engines are stub servers or records of calls, processes and trainer are fakes; tests/e2e/test_engine_faults.py has real
ones."""

import asyncio
import contextlib
import json

import pytest

from tests.support import patience
from tests.support.plans import engine_plan, plan_of
from tests.support.stub_engine import KEY, CharacterTokenizer, StubEngine
from tests.support.sync_session import session
from vime.rollout.client import EngineClient, Generated
from vime.rollout.client import RequestDeadlines as ClientDeadlines
from vime.rollout.dispatch import Patience
from vime.rollout.sampler import Sampler
from vime.sync.ranks import address
from vime.train.handover import Handover
from vime.train.supervisor import EngineLost, EngineSupervisor, RecoveryDeadlines

VERSION = 3


class World:
    """Two stub engines whose server processes, weights and trainer are simulated."""

    def __init__(self, plan, stubs, clients, patience):
        self.stubs, self.restarts, self.stays_dead = stubs, [], False
        self.trainer_calls = []
        handover = Handover(plan, self.call, clients)
        self.sampler = Sampler(plan, clients, recover=self.recover, patience=patience, tokenizer=CharacterTokenizer())
        self.supervisor = EngineSupervisor(
            plan, self, clients, self, self.call, handover, [[ord(c) for c in "1+1="]], RecoveryDeadlines(probe=1.0)
        )
        self.supervisor.version = VERSION

    async def recover(self, engine, error):
        await self.supervisor.recover(engine, error)

    async def restart(self, engines, *, deadline_s):
        for number in engines:
            self.restarts.append(number)
            stub = self.stubs[number]
            stub.version, stub.fault, stub.holds = "default", lambda *_: None, lambda _: False
            if not self.stays_dead:
                with contextlib.suppress(OSError):
                    await stub.listen(stub.port)

    async def exited(self):
        return []

    async def run(self, version):
        for stub in self.stubs:
            stub.version = str(version)
        return {}

    def restarted(self, engine, client):
        pass

    async def call(self, deadline_s, function, sequences):
        _, method = address(function)
        self.trainer_calls.append(method)
        assert method == "log_probs"
        return [[[-0.25] * len(response) for _, response in sequences]]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in range(8) for b in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@contextlib.asynccontextmanager
async def world_of(prompts, *stubs, waits=None, flags=()):
    base = ("--prompt-data", str(prompts), "--eval-prompt-data", "sums", str(prompts), "--rm-type", "math")
    base += ("--rollout-batch-size", "12", "--over-sampling-batch-size", "12", "--n-samples-per-prompt", "4")
    base += ("--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none", "--no-rollout-shuffle")
    # GPUs of their own, so that no hand-over takes part.
    base += ("--no-colocate", "--rollout-num-gpus", "2", "--rollout-timeout", str(patience.PROCESS))
    plan = plan_of("tiny-qwen3", *base, *flags, nodes=3)
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                EngineClient(stub.url, KEY, deadlines=ClientDeadlines(control=patience.STUB))
            )
            for stub in stubs
        ]
        world = World(plan, stubs, clients, waits or Patience(recovery=patience.ANSWER, abort=patience.ANSWER))
        await stack.enter_async_context(world.sampler)
        yield world


def assert_whole(rollout):
    assert [group.index for group in rollout.groups] == list(range(12))
    assert sorted(sample.index for sample in rollout.samples) == list(range(48))
    assert {version for sample in rollout.samples for version in sample.weight_versions} == {VERSION}
    assert all(sample.response == sample.label for sample in rollout.samples)


async def test_an_engine_killed_in_a_rollout_comes_back_with_the_weights_of_the_rollout(prompts):
    async with StubEngine() as a, StubEngine() as b, world_of(prompts, a, b) as world:
        await world.supervisor.sync()
        a.holds = lambda _: True
        a.requests.clear()
        round_ = asyncio.create_task(world.sampler.generate(VERSION))
        await a.has_requests(24)
        await a.die()
        rollout = await asyncio.wait_for(round_, patience.PROCESS)
        await world.sampler.settled()
        assert a.version == str(VERSION)
    assert world.restarts == [0]
    assert_whole(rollout)
    assert rollout.metrics["rollout/request_retries"] == 24


async def test_an_engine_that_hangs_in_a_rollout_is_restarted(prompts):
    waits = Patience(recovery=patience.ANSWER, abort=patience.ANSWER, stall=0.5, watch=0.1)
    async with (
        StubEngine(fault=lambda *_: "hang") as a,
        StubEngine() as b,
        world_of(prompts, a, b, waits=waits) as world,
    ):
        # Not by a sync first: it would wait for an answer of the engine that hangs.
        await world.run(VERSION)
        rollout = await asyncio.wait_for(world.sampler.generate(VERSION), patience.PROCESS)
        await world.sampler.settled()
    assert world.restarts == [0]
    assert_whole(rollout)


async def test_a_connection_that_breaks_costs_a_repetition_and_no_restart(prompts):
    async with StubEngine() as a, StubEngine() as b, world_of(prompts, a, b) as world:
        await world.supervisor.sync()
        a.fault = lambda number, body: "reset" if number == 4 else None
        rollout = await asyncio.wait_for(world.sampler.generate(VERSION), patience.PROCESS)
        await world.sampler.settled()
    assert world.restarts == []
    assert_whole(rollout)


async def test_an_engine_that_does_not_come_back_ends_the_run_with_its_failure(prompts):
    flags = ("--max-engine-restarts", "2")
    async with (
        StubEngine(holds=lambda _: True) as a,
        StubEngine(holds=lambda _: True) as b,
        world_of(prompts, a, b, flags=flags) as world,
    ):
        await world.run(VERSION)
        round_ = asyncio.create_task(world.sampler.generate(VERSION))
        await a.has_requests(24)
        world.stays_dead = True
        await a.die()
        with pytest.raises(EngineLost, match=r"engine 0 failed 3 times within one rollout"):
            await asyncio.wait_for(round_, patience.PROCESS)
    assert world.restarts == [0, 0]


async def test_after_a_sync_that_failed_half_way_every_engine_is_loaded_whole_before_it_serves():
    """The real session of a sync, under the supervisor."""
    sync, trainer, engines, journal = session([engine_plan(0, {0: (0,)}), engine_plan(1, {1: (0,)})])
    engines[1].fails_at = ("update_weights", 1)
    plan = plan_of("tiny-qwen3")

    class Servers:
        async def restart(self, restarted, *, deadline_s):
            journal.append(("restart", tuple(restarted)))
            engines[1].fails_at = None

        async def exited(self):
            return []

    class WithDriver:
        run = staticmethod(lambda version: sync.run(version))

        restarted = staticmethod(lambda engine, client: sync.restarted(engine, client))

    async def call(deadline_s, function, sequences):
        return [[[-0.25] for _ in sequences]]

    async def generate(*_, **__):
        return Generated([5], [-0.25], [VERSION], "stop")

    for each in engines:
        each.generate = generate
    handover = Handover(plan_of("tiny-qwen3", "--no-colocate", "--rollout-num-gpus", "1"), call, engines)
    supervisor = EngineSupervisor(plan, Servers(), engines, WithDriver(), call, handover, [[1]])
    supervisor.version = VERSION
    await supervisor.sync()
    names = [name for name, _ in journal]
    cut = names.index("restart")
    assert journal[cut] == ("restart", (0, 1))
    for number in (0, 1):
        assert f"{number}:resume" not in names[:cut]
        after = [name for name in names[cut:] if name.startswith(f"{number}:")]
        assert after.count(f"{number}:update_weights") == trainer.buckets
        assert after.count(f"{number}:init_weight_transfer") == 1
        assert after[-1] == f"{number}:resume"
