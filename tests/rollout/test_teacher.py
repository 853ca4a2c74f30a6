"""The teacher against stub engines: every token of what training gets is scored, and what fails is waited for."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

import pytest

from tests.support.stub_engine import END, KEY, CharacterTokenizer, StubEngine, answer_of, choice, encode
from vime.errors import Cause, DataError
from vime.rollout import teacher as module
from vime.rollout.client import EngineAnswer, EngineClient, EngineError, RequestDeadlines
from vime.rollout.sampler import Sampler
from vime.rollout.teacher import ATTEMPTS, Teacher, TeacherFailed, parse_scores
from vime.samples import Group, Sample, Status

FOLDER = "/teachers/large"
OPD = ("--use-opd", "--opd-teacher", FOLDER)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(module, "LONGEST_PAUSE_SECONDS", 0.1)


@contextlib.asynccontextmanager
async def teacher_of(*engines: StubEngine, patience_s: float = 5.0, recover: Any = None):
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for engine in engines:
            client = EngineClient(engine.url, KEY, deadlines=RequestDeadlines(connect=1), model="teacher")
            clients.append(await stack.enter_async_context(client))
        yield Teacher(FOLDER, clients, patience_s=patience_s, recover=recover)


def sample_of(index: int = 0, prompt: str = "1+1=", response: str = "2") -> Sample:
    return Sample(index, 0, prompt, encode(prompt), response_ids=[*encode(response), END], status=Status.COMPLETED)


def scores_of(sample: Sample) -> list[float]:
    """Log-probs that the stub gives to the tokens of a response."""
    start = len(sample.prompt_ids)
    return [-0.01 * token - place for place, token in enumerate(sample.response_ids, start=start)]


async def test_every_response_token_gets_the_teachers_log_prob_behind_the_whole_prompt():
    group = Group(0, [sample_of(0), sample_of(1, response="22")])
    group.samples[1].branches = [sample_of(1, prompt="9=", response="9")]
    async with StubEngine() as engine, teacher_of(engine) as teacher:
        await teacher.score(group)
        asked = len(engine.requests)
        await teacher.score(group)  # what is scored is not asked for again
    every = [*group.samples, *group.samples[1].branches]
    assert [sample.teacher_log_probs for sample in every] == [scores_of(sample) for sample in every]
    assert len(engine.requests) == asked == 3
    assert engine.requests[0]["model"] == "teacher"
    assert [*engine.requests[0]["token_ids"], *engine.requests[0]["sampling_params"]["allowed_token_ids"]] == [
        *every[0].prompt_ids,
        *every[0].response_ids,
    ]
    assert engine.requests[0]["sampling_params"]["max_tokens"] == 1


async def test_engines_share_the_samples():
    group = Group(0, [sample_of(number) for number in range(12)])
    async with StubEngine() as one, StubEngine() as other, teacher_of(one, other) as teacher:
        await teacher.score(group)
    assert {len(one.requests), len(other.requests)} == {6}


def broken(scores: Any) -> dict[str, Any]:
    return {"choices": [], "prompt_logprobs": scores}


@pytest.mark.parametrize(
    "fault",
    [500, 503, 429, "reset", broken(None), broken([None]), broken([None] * 5), broken([{"1": {"logprob": 0}}] * 5)],
)
async def test_a_fault_is_repeated_and_counted(fault: Any):
    group = Group(0, [sample_of()])
    twice = StubEngine(fault=lambda number, _: fault if number < 2 else None)
    async with twice as engine, teacher_of(engine) as teacher:
        await teacher.score(group)
        metrics = teacher.take_metrics()
    assert group.samples[0].teacher_log_probs == scores_of(group.samples[0])
    assert metrics["rollout/teacher_retries"] == 2
    assert metrics["perf/teacher_time"] > 0
    assert teacher.take_metrics() == {"perf/teacher_time": 0.0, "rollout/teacher_retries": 0.0}


@pytest.mark.parametrize("fault", [503, "reset", "hang"])
async def test_a_teacher_that_stays_away_or_is_late_ends_the_run_with_a_cause_that_names_it(fault: Any):
    async with StubEngine(fault=lambda *_: fault) as engine, teacher_of(engine, patience_s=0.3) as teacher:
        with pytest.raises(
            TeacherFailed, match=rf"the teacher {FOLDER} was away or late for 0.3 s .--opd-teacher-patience."
        ) as e:
            async with asyncio.timeout(10):
                await teacher.score(Group(0, [sample_of()]))
    assert e.value.cause is Cause.CRASH
    assert e.value.cause.requeue_mends


async def test_a_request_that_no_teacher_takes_ends_the_run_at_once():
    async with StubEngine(fault=lambda *_: 400) as engine, teacher_of(engine, patience_s=60) as teacher:
        with pytest.raises(TeacherFailed, match=rf"the teacher {FOLDER} cannot score sample 7: .* answered 400") as e:
            await teacher.score(Group(0, [sample_of(7)]))
    assert e.value.cause is Cause.DATA_ERROR
    assert len(engine.requests) == 1


async def test_a_sample_that_fails_where_others_are_scored_is_named():
    bad = encode("9+9=")

    def fault(_number: int, body: dict[str, Any]) -> int | None:
        return 500 if body["token_ids"][: len(bad)] == bad else None

    async with StubEngine(fault=fault) as engine, teacher_of(engine, patience_s=60) as teacher:

        async def others() -> None:
            while True:
                await teacher.score(Group(1, [sample_of()]))
                await asyncio.sleep(0.005)

        working = asyncio.create_task(others())
        with pytest.raises(TeacherFailed, match=f"failed {ATTEMPTS} times on sample 3"):
            await teacher.score(Group(0, [sample_of(3, prompt="9+9=")]))
        working.cancel()


async def test_an_engine_whose_process_ended_is_restarted_while_the_other_goes_on():
    restarted = []
    async with StubEngine() as dead, StubEngine() as alive:
        port = dead.port
        await dead.die()

        async def recover(place: int, error: EngineError) -> bool:
            if restarted:
                return False
            restarted.append((place, type(error).__name__))
            await dead.listen(port)
            return True

        async with teacher_of(dead, alive, patience_s=5, recover=recover) as teacher:
            group = Group(0, [sample_of(number) for number in range(8)])
            await teacher.score(group)
    assert restarted == [(0, "EngineUnreachable")]
    assert all(sample.teacher_log_probs for sample in group.samples)


def test_scores_that_cannot_be_right_are_refused():
    def body(*scores: Any, last: float = -0.5) -> bytes:
        prompt = [None, *({str(5): {"logprob": score}} for score in scores)]
        sampled = choice([7], "length")
        sampled["logprobs"]["content"][0]["logprob"] = last
        return json.dumps({"prompt_logprobs": prompt, "choices": [sampled]}).encode()

    assert parse_scores(body(-1.0, -2.5), [5, 5, 5, 7], 1) == [-1.0, -2.5, -0.5]
    assert parse_scores(body(-1.0, -2.5), [5, 5, 5, 7], 3) == [-0.5]
    for scores, last in (([-9999.0, -1.0], -1.0), ([0.5, -1.0], -1.0), ([-1.0], -1.0), ([-1.0, -1.0], 0.5)):
        with pytest.raises(EngineAnswer):
            parse_scores(body(*scores, last=last), [5, 5, 5, 7], 1)
    with pytest.raises(EngineAnswer, match="has no log-prob of token 6 at place 2"):
        parse_scores(body(-1.0, -2.5), [5, 5, 6, 7], 1)
    with pytest.raises(EngineAnswer, match="has no log-prob of token 8 at place 3"):
        parse_scores(body(-1.0, -2.5), [5, 5, 5, 8], 3)
    with pytest.raises(EngineAnswer, match="not what vLLM documents"):
        parse_scores(b"<html>", [5], 1)


@contextlib.asynccontextmanager
async def sampler_of(plan: Any, engine: StubEngine, teaching: StubEngine, recover: Any = None):
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(EngineClient(engine.url, KEY))
        teacher = await stack.enter_async_context(teacher_of(teaching, recover=recover))
        sampler = Sampler(plan, [client], tokenizer=CharacterTokenizer(), teacher=teacher)
        yield await stack.enter_async_context(sampler)


async def test_a_rollout_brings_the_scores_of_the_groups_that_pass_the_filter_alone(sums: Any):
    def half(token_ids: list[int], number: int) -> list[int]:
        return answer_of(token_ids) if token_ids[0] % 2 and number % 2 else [*encode("99"), END]

    plan = sums(*OPD, "--dynamic-sampling-filter-path", "check_reward_nonzero_std")
    async with StubEngine(answer=half) as engine, StubEngine() as teaching, sampler_of(plan, engine, teaching) as made:
        rollout = await made.generate(0)
    assert [sample.teacher_log_probs for sample in rollout.samples] == [scores_of(sample) for sample in rollout.samples]
    assert rollout.metrics["rollout/filter_drops"] > 0
    assert len(teaching.requests) < 4 * rollout.metrics["rollout/num_finished_groups"]
    assert rollout.metrics["perf/teacher_time"] > 0


async def test_without_a_reward_every_sample_has_the_reward_0(sums: Any):
    flags = ("--advantage-estimator", "on_policy_distillation", "--rm-type", "none")
    plan = sums(*OPD, *flags, "--eval-prompt-data", "[]", "--eval-interval", "none")
    async with StubEngine() as engine, StubEngine() as teaching, sampler_of(plan, engine, teaching) as made:
        rollout = await made.generate(0)
    assert {sample.reward for sample in rollout.samples} == {0.0}
    assert all(len(sample.teacher_log_probs) == len(sample.response_ids) for sample in rollout.samples)


async def test_a_continued_answer_is_scored_whole_and_scores_stay_with_the_samples_of_an_unfinished_group(sums: Any):
    """Samples that the end of a round stopped continue after a resume: at an engine, or at the teacher."""
    plan = sums(*OPD, "--partial-rollout", "--over-sampling-batch-size", "12")
    held, slow = [encode(f"0+{b}=") for b in (0, 1)], [encode(f"0+{b}=") for b in (2, 3)]
    late = True

    def hangs(number: int, body: dict[str, Any]) -> str | None:
        return "hang" if late and body["token_ids"][:4] in slow and number % 2 else None

    async with StubEngine(holds=lambda ids: ids in held) as engine, StubEngine(fault=hangs) as teaching:
        async with sampler_of(plan, engine, teaching) as made:
            first = await made.generate(0)
            state = json.loads(json.dumps(made.state_dict()))
        engine.release()
        late, before = False, len(teaching.requests)
        async with sampler_of(plan, engine, teaching) as again:
            again.load_state_dict(state)
            # The round takes the groups that finish first; what it leaves is in the next.
            later = [*(await again.generate(1)).samples, *(await again.generate(2)).samples]
    kept = [values for packed in state["kept"] for values in packed["samples"]]
    assert {len(values["teacher_log_probs"]) == len(values["response_ids"]) for values in kept} == {True, False}
    assert any(sample.prompt_ids in held for sample in later)
    for sample in (*first.samples, *later):
        assert sample.teacher_log_probs == scores_of(sample)
    asked = [request["token_ids"][:4] for request in teaching.requests[before:]]
    assert 0 < sum(prompt in slow for prompt in asked) < 8


async def test_the_clock_of_a_rollout_stands_still_while_a_teacher_that_failed_is_waited_for(sums: Any):
    async def slow_restart(place: int, error: EngineError) -> bool:
        await asyncio.sleep(2.5)
        teaching.fault = lambda *_: None
        return True

    plan = sums(*OPD, "--rollout-timeout", "2")
    teaching = StubEngine(fault=lambda *_: "reset")
    async with StubEngine() as engine, teaching, sampler_of(plan, engine, teaching, slow_restart) as made:
        rollout = await made.generate(0)
    assert all(sample.teacher_log_probs == scores_of(sample) for sample in rollout.samples)


async def test_a_rollout_that_a_late_teacher_keeps_from_its_end_says_so(sums: Any):
    plan = sums(*OPD, "--rollout-timeout", "1")
    said = rf"is not full .*; \d+ samples wait for the teacher {FOLDER}"
    teaching = StubEngine(fault=lambda *_: "hang")
    async with StubEngine() as engine, teaching, sampler_of(plan, engine, teaching) as made:
        with pytest.raises(DataError, match=said):
            await made.generate(0)


def test_scores_are_among_the_plain_values_of_a_sample_and_go_with_its_response():
    sample = sample_of()
    sample.teacher_log_probs = [-1.5, -0.25]
    values = json.loads(json.dumps(sample.values()))
    assert Sample.from_values(values).teacher_log_probs == [-1.5, -0.25]
    del values["teacher_log_probs"]  # as versions before wrote it
    assert Sample.from_values(values).teacher_log_probs == []
    sample.restart()
    assert sample.teacher_log_probs == []
