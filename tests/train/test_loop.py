"""The order of a run's steps, with GPUs shared and apart. Trainer, sampler and engines are fakes that write a journal;
tests/e2e runs the loop with real ones."""

import asyncio
import json

import pytest

from tests.support import patience
from tests.support.plans import plan_of
from vime.run.folder import write_plan
from vime.run.left_out import left_out
from vime.run.metrics import read_metrics
from vime.samples import Group, Rollout, Sample, Status
from vime.sync.ranks import address
from vime.train.loop import Loop
from vime.train.phases import Phases
from vime.train.spike_guard import Spike

APART = ("--no-colocate", "--rollout-num-gpus", "1")


class World:
    """A loop whose actors are replaced; `journal` has what began and ended in order."""

    def __init__(self, tmp_path, monkeypatch, *flags):
        monkeypatch.setattr("ray.put", lambda value: value)
        base = ("--num-rollout", "3", "--eval-interval", "none", "--save-interval", "1")
        plan = plan_of("tiny-qwen3", *base, *flags).model_copy(update={"run_dir": str(tmp_path)})
        (tmp_path / "control").mkdir(exist_ok=True)
        write_plan(plan)
        self.journal, self.saved, self.turn, self.version = [], [], asyncio.Lock(), 0
        self.published, self.answer = [], tmp_path / "control" / "checkpoint-done"
        self.prompts = 0
        self.training, self.trainable = asyncio.Event(), asyncio.Event()
        self.trainable.set()
        self.loop = Loop(Phases.of(plan), self.call, self, self)

    # The trainer

    async def call(self, deadline_s, function, *args):
        _, method = address(function)
        if method == "take_spans":
            return [[], []]
        if method == "save":
            self.saved.append((args[0], args[1]["sampler"]["prompts"]))
            return ["checkpoint"]
        if method == "finish_save":
            assert not self.answer.exists()
            self.published = list(self.saved)
            return [None]
        if method == "poll_save":
            self.journal.append("poll")
            return [True]
        assert method == "train"
        self.journal.append(f"train {args[0].rollout_id}")
        self.training.set()
        await asyncio.sleep(0)
        await self.trainable.wait()
        self.journal.append(f"trained {args[0].rollout_id}")
        return [{"train/loss": 1.0}]

    # The sampler

    async def generate(self, rollout_id):
        self.journal.append(f"generate {rollout_id} with {self.version_of_engines}")
        self.prompts += 1
        await asyncio.sleep(0.01)
        self.journal.append(f"generated {rollout_id}")
        sample = Sample(0, 0, "?", [1], response_ids=[2], reward=1.0, status=Status.COMPLETED)
        return Rollout(rollout_id, [Group(0, [sample])], rows=[("math", rollout_id)])

    def state_dict(self):
        return {"prompts": self.prompts}

    def load_state_dict(self, state):
        self.prompts = state["prompts"]

    def take_spans(self):
        return []

    async def settled(self):
        pass

    # The supervisor

    version_of_engines = 0

    async def sync(self):
        self.journal.append(f"sync {self.version}")
        self.version_of_engines = self.version
        return {"sync/time": 0.0}

    async def to_trainer(self):
        self.journal.append("to trainer")


@pytest.fixture
def world(tmp_path, monkeypatch):
    return lambda *flags: World(tmp_path, monkeypatch, *flags)


async def test_with_shared_gpus_one_step_follows_the_other(world):
    it = world()
    await it.loop.run(0)
    one = ["generate {0} with {0}", "generated {0}", "to trainer", "train {0}", "trained {0}", "sync {1}"]
    assert it.journal == [step.format(n, n + 1) for n in range(3) for step in one]


async def test_with_gpus_of_their_own_engines_generate_the_next_rollout_while_one_is_trained_on(world):
    it = world(*APART)
    it.trainable.clear()
    good = it.generate

    async def generate(rollout_id):
        rollout = await good(rollout_id)
        if rollout_id == 1:
            it.trainable.set()
        return rollout

    it.generate = generate
    await asyncio.wait_for(it.loop.run(0), patience.MOMENT)
    assert it.journal.index("generated 1") < it.journal.index("trained 0")


async def test_engines_are_at_most_one_version_behind_and_never_synced_in_the_middle_of_a_rollout(world):
    it = world(*APART)
    await it.loop.run(0)
    begins = [step for step in it.journal if step.startswith("generate ")]
    assert begins == ["generate 0 with 0", "generate 1 with 0", "generate 2 with 1"]
    under_way = 0
    for step in it.journal:
        under_way += step.startswith("generate ") - step.startswith("generated ")
        assert not (step.startswith("sync") and under_way)


async def test_without_allowed_staleness_engines_wait_for_the_weights(world):
    it = world(*APART, "--max-staleness", "0")
    await it.loop.run(0)
    begins = [step for step in it.journal if step.startswith("generate ")]
    assert begins == ["generate 0 with 0", "generate 1 with 1", "generate 2 with 2"]


@pytest.mark.parametrize(("flags", "prompts"), [((), [1, 2, 3]), (APART, [1, 2, 3])])
async def test_a_checkpoint_holds_the_data_cursor_from_before_the_rollout_that_is_not_trained_on(world, flags, prompts):
    it = world(*flags)
    await it.loop.run(0)
    assert it.saved == list(enumerate(prompts))


async def test_a_checkpoint_on_request_ends_the_run_and_the_rollout_that_is_ahead(world, tmp_path):
    it = world(*APART)
    (tmp_path / "control" / "checkpoint-request").write_text("")
    await it.loop.run(0)
    assert json.loads((tmp_path / "control" / "checkpoint-done").read_text())["rollout_id"] == 0
    assert "train 1" not in it.journal
    assert list(read_metrics(tmp_path)) == [0]


@pytest.mark.parametrize("flags", [(), APART])
async def test_every_checkpoint_is_published_before_the_run_ends(world, flags):
    it = world(*flags)
    await it.loop.run(0)
    assert len(it.published) == 3


async def test_a_checkpoint_on_request_is_published_before_the_answer(world, tmp_path):
    it = world()
    (tmp_path / "control" / "checkpoint-request").write_text("")
    await it.loop.run(0)
    assert len(it.published) == 1
    assert it.answer.exists()


async def test_what_was_written_in_the_background_is_published_between_the_trainers_other_turns(world, monkeypatch):
    monkeypatch.setattr("vime.train.loop.SAVE_POLL_SECONDS", 0.001)
    it = world("--async-save")
    it.trainable.clear()
    task = asyncio.create_task(it.loop.publish_saves())
    run = asyncio.create_task(it.loop.run(0))
    await asyncio.wait_for(it.training.wait(), patience.MOMENT)
    assert "poll" in it.journal[: it.journal.index("to trainer")]
    await asyncio.sleep(0.02)
    assert it.journal[-1] == "train 0"
    it.trainable.set()
    await asyncio.wait_for(run, patience.MOMENT)
    task.cancel()


async def test_a_rollout_ahead_that_fails_ends_the_run_after_what_was_trained_is_reported(world, tmp_path):
    it = world(*APART)
    good = it.generate

    async def generate(rollout_id):
        if rollout_id == 1:
            raise ValueError("no engine left")
        return await good(rollout_id)

    it.generate = generate
    with pytest.raises(ValueError, match="no engine left"):
        await it.loop.run(0)
    assert read_metrics(tmp_path)[0]["train/loss"] == 1.0


@pytest.mark.parametrize("flags", [(), APART])
async def test_a_rollout_that_was_finished_but_not_saved_is_not_generated_again(world, flags):
    first = world(*flags, "--save-interval", "3")
    first.trainable.clear()
    dies = asyncio.create_task(first.loop.run(0))
    await first.training.wait()
    dies.cancel()
    await asyncio.gather(dies, return_exceptions=True)
    second = world(*flags, "--save-interval", "3")
    await second.loop.run(0)
    again = [step.split()[1] for step in second.journal if step.startswith("generate ")]
    assert again == ["1", "2"]
    assert [step for step in second.journal if step.startswith("train ")] == ["train 0", "train 1", "train 2"]
    assert second.saved == [(2, 3)]


async def test_a_rollout_that_spikes_is_not_saved_and_not_trained_on_again(world, tmp_path):
    flags = ("--num-rollout", "12", "--spike-guard", "rollback")
    first = world(*flags)
    good = first.call

    async def call(deadline_s, function, *args):
        found = await good(deadline_s, function, *args)
        if address(function)[1] != "train":
            return found
        return [{"train/grad_norm": 500.0 if args[0].rollout_id == 10 else 1.0}]

    first.loop.trainer = call
    with pytest.raises(Spike, match="rollout 10 spiked"):
        await first.loop.run(0)
    assert first.saved[-1][0] == 9
    assert left_out(tmp_path) == {("math", 10)}
    second = world(*flags)
    await second.loop.run(10)
    assert next(step for step in second.journal if step.startswith("generate ")) == "generate 10 with 0"
