"""Rollouts against stub engines: groups stay whole, none is lost or doubled, whatever the engines do."""

import asyncio
import contextlib
import json

import pytest

from tests.support import patience
from tests.support.stub_engine import END, KEY, CharacterTokenizer, StubEngine, answer_of, encode
from vime.errors import BadInput, Cause, DataError, VimeError
from vime.rollout.client import EngineClient, EngineStatus, EngineTimeout, RequestDeadlines
from vime.rollout.dispatch import Patience
from vime.rollout.sampler import Sampler
from vime.samples import Status

IMPATIENT = Patience(recovery=patience.ANSWER, stall=0.3, watch=0.1, abort=patience.ANSWER)
PATIENT = Patience(recovery=patience.ANSWER, abort=patience.ANSWER)


def sometimes_wrong(token_ids, number):
    """Right and wrong answers in turn, so that every group's rewards differ."""
    return answer_of(token_ids) if number % 2 else [*encode("99"), END]


@contextlib.asynccontextmanager
async def sampler_of(plan, *engines, waits=PATIENT, concurrency=64, recover=None):
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for engine in engines:
            client = EngineClient(
                engine.url, KEY, concurrency=concurrency, deadlines=RequestDeadlines(control=patience.STUB)
            )
            clients.append(await stack.enter_async_context(client))
        sampler = Sampler(plan, clients, recover=recover, patience=waits, tokenizer=CharacterTokenizer())
        yield await stack.enter_async_context(sampler)


def prompts_of(rollout):
    return [group.samples[0].prompt for group in rollout.groups]


def assert_whole(rollout, groups=6, samples=4):
    assert len(rollout.groups) == groups
    assert len({group.index for group in rollout.groups}) == groups
    numbers = [sample.index for sample in rollout.samples]
    assert len(set(numbers)) == groups * samples
    for group in rollout.groups:
        assert len(group.samples) == samples
        assert len({sample.prompt for sample in group.samples}) == 1
        for sample in group.samples:
            assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
            assert len(sample.response_ids) == len(sample.log_probs) == len(sample.weight_versions)
            assert len(sample.response_ids) == len(sample.loss_mask)
            assert sample.response_ids
            assert sample.reward is not None


async def test_a_rollout_has_as_many_whole_groups_as_training_wants_in_the_order_of_their_prompts(sums):
    async with StubEngine() as engine, sampler_of(sums(), engine) as sampler:
        rollout = await sampler.generate(0)
    assert_whole(rollout)
    indices = [group.index for group in rollout.groups]
    assert indices == sorted(indices)
    assert rollout.metrics["rollout/raw_reward"] == 1.0
    assert rollout.metrics["rollout/response_length"] >= 2
    assert rollout.metrics["perf/rollout_tokens_per_s"] > 0
    assert rollout.samples[0].response == rollout.samples[0].label


async def test_only_groups_with_different_rewards_pass_and_the_mean_reward_counts_the_dropped_ones_too(sums):
    def half_of_the_prompts(token_ids, number):
        return sometimes_wrong(token_ids, number) if token_ids[0] % 2 else answer_of(token_ids)

    plan = sums("--dynamic-sampling-filter-path", "check_reward_nonzero_std")
    async with StubEngine(answer=half_of_the_prompts) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert_whole(rollout)
    for group in rollout.groups:
        assert {sample.reward for sample in group.samples} == {0.0, 1.0}
    assert rollout.metrics["rollout/filter_drops"] > 0
    assert rollout.metrics["rollout/raw_reward"] > rollout.metrics["rollout/reward"] == 0.5
    dropped, finished = rollout.metrics["rollout/filter_drops"], rollout.metrics["rollout/num_finished_groups"]
    assert finished == 6 + dropped
    assert rollout.metrics["rollout/raw_reward"] == pytest.approx((dropped + 6 * 0.5) / finished)


async def test_a_round_that_can_never_fill_ends_with_the_counts(sums):
    plan = sums("--dynamic-sampling-filter-path", "check_reward_nonzero_std")
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        with pytest.raises(
            DataError, match=r"0 of 6 groups passed; [89]\d finished, of which the filter dropped [89]\d"
        ):
            await sampler.generate(0)


async def test_a_round_that_takes_too_long_ends_with_the_counts(sums):
    async with (
        StubEngine(tokens_per_s=0.5) as engine,
        sampler_of(sums("--rollout-timeout", "0.5"), engine) as sampler,
    ):
        with pytest.raises(DataError, match=r"not full after --rollout-timeout 0\.5 s: 0 of 6 groups passed"):
            await sampler.generate(0)


async def test_truncated_responses_are_marked_and_counted(sums):
    def long(token_ids, number):
        return encode("123456789") if number % 2 else answer_of(token_ids)

    async with StubEngine(answer=long) as engine, sampler_of(sums(), engine) as sampler:
        rollout = await sampler.generate(0)
    cut = [sample for sample in rollout.samples if sample.status == Status.TRUNCATED]
    assert all(len(sample.response_ids) == 8 for sample in cut)
    assert len(cut) == 12
    assert rollout.metrics["rollout/truncated_share"] == 0.5


async def test_all_samples_of_a_prompt_go_to_one_engine_and_one_data_parallel_rank(sums):
    flags = ("--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "2", "--vllm-data-parallel-size", "2")
    plan = sums(*flags, nodes=2)
    assert len(plan.engines) == 2
    async with StubEngine() as first, StubEngine() as second, sampler_of(plan, first, second) as sampler:
        await sampler.generate(0)
    seats: dict[str, set[tuple[int, str]]] = {}
    for number, engine in enumerate((first, second)):
        for request in engine.requests:
            seats.setdefault(str(request["token_ids"]), set()).add((number, request["rank"]))
    assert all(len(places) == 1 for places in seats.values())
    assert {place for places in seats.values() for place in places} == {(0, "0"), (0, "1"), (1, "0"), (1, "1")}


async def test_the_order_of_prompts_depends_on_the_seed_alone_and_goes_on_exactly_after_a_resume(sums):
    async def run(rollouts, state=None, seed="5"):
        flags = ("--rollout-shuffle", "--rollout-seed", seed, "--over-sampling-batch-size", "6")
        plan = sums(*flags, "--max-staleness", "10")  # the stub's weights are never synced
        async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
            if state:
                sampler.load_state_dict(state)
            return [prompts_of(await sampler.generate(number)) for number in range(rollouts)], sampler.state_dict()

    whole, _ = await run(8)
    again, _ = await run(8)
    other, _ = await run(8, seed="6")
    start, state = await run(3)
    rest, _ = await run(5, state)
    assert whole == again == start + rest
    assert other != whole
    assert len({prompt for prompts in whole[:6] for prompt in prompts}) == 36  # an epoch has 40


async def test_prompts_that_were_aborted_are_first_in_the_next_rollout(sums):
    last_two = (encode("1+1="), encode("1+2="))
    async with StubEngine(holds=last_two.__contains__) as engine, sampler_of(sums(), engine) as sampler:
        first = await sampler.generate(0)
        state = sampler.state_dict()
    assert "/abort_requests" in engine.calls
    assert [row["row"] for row in state["kept"]] == [6, 7]
    plan = sums("--over-sampling-batch-size", "6")
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        sampler.load_state_dict(state)
        second = await sampler.generate(1)
    assert_whole(second)
    assert [group.index for group in (*first.groups, *second.groups)] == list(range(12))
    assert not set(prompts_of(first)) & set(prompts_of(second))


@pytest.mark.parametrize("mask", [False, True])
async def test_partial_rollouts_keep_tokens_versions_and_mask_and_survive_a_resume(sums, mask):
    def one_long_group(token_ids, _):
        return encode("1234567") if token_ids == encode("0+0=") else answer_of(token_ids)

    def continued(token_ids, _):
        made = len(token_ids) - 4
        return encode("1234567")[made:] if token_ids[:4] == encode("0+0=") else answer_of(token_ids)

    flags = ("--partial-rollout", *(("--mask-offpolicy-in-partial-rollout",) if mask else ()))
    flags += ("--over-sampling-batch-size", "7")
    async with (
        StubEngine(holds=encode("0+0=").__eq__, answer=one_long_group) as engine,
        sampler_of(sums(*flags), engine) as sampler,
    ):
        first = await sampler.generate(0)
        state = sampler.state_dict()
    assert_whole(first)
    assert [kept["row"] for kept in state["kept"]] == [0]
    before = state["kept"][0]["samples"]
    assert {sample["status"] for sample in before} == {"aborted"}
    made = [len(sample["response_ids"]) for sample in before]
    assert all(0 < tokens < 7 for tokens in made)
    plan = sums(*flags[:-1], "6")
    async with StubEngine(version="1", answer=continued) as engine, sampler_of(plan, engine) as sampler:
        sampler.load_state_dict(state)
        second = await sampler.generate(1)
    assert_whole(second)
    group = next(group for group in second.groups if group.index == 0)
    for sample, old in zip(group.samples, made, strict=True):
        assert sample.response == "1234567"
        assert sample.weight_versions == [0] * old + [1] * (7 - old)
        assert sample.loss_mask == [0 if mask else 1] * old + [1] * (7 - old)
    assert second.metrics["rollout/staleness_max"] == 1.0


async def test_answers_of_weights_that_are_too_old_are_generated_anew(sums):
    def one_long_group(token_ids, _):
        return encode("1234567") if token_ids == encode("0+0=") else answer_of(token_ids)

    flags = ("--partial-rollout", "--over-sampling-batch-size", "7", "--max-staleness", "1")
    async with (
        StubEngine(holds=encode("0+0=").__eq__, answer=one_long_group) as engine,
        sampler_of(sums(*flags), engine) as sampler,
    ):
        await sampler.generate(0)
        state = sampler.state_dict()
    assert {sample["status"] for sample in state["kept"][0]["samples"]} == {"aborted"}
    plan = sums(*flags, "--over-sampling-batch-size", "6")
    async with StubEngine(version="2") as engine, sampler_of(plan, engine) as sampler:
        sampler.load_state_dict(state)
        rollout = await sampler.generate(2)
    assert rollout.groups[0].index == 0
    assert {version for sample in rollout.groups[0].samples for version in sample.weight_versions} == {2}
    assert rollout.metrics["rollout/staleness_max"] == 0


async def test_engines_that_are_further_behind_than_allowed_end_the_run(sums):
    async with StubEngine(version="3") as engine, sampler_of(sums("--max-staleness", "1"), engine) as sampler:
        ahead = await sampler.generate(4)
        assert ahead.metrics["rollout/staleness"] == ahead.metrics["rollout/staleness_max"] == 1
        with pytest.raises(DataError, match=r"rollout 5 has tokens from weights of version 3, more than --max-stale"):
            await sampler.generate(5)


async def test_every_request_has_a_seed_that_depends_on_the_sample_alone(sums):
    async def seeds(*flags, faults=()):
        plan = sums("--over-sampling-batch-size", "6", *flags)
        async with StubEngine(fault=nth(faults, 500)) as engine, sampler_of(plan, engine) as sampler:
            await sampler.generate(0)
        return {(str(r["token_ids"]), r["sampling_params"]["seed"]) for r in engine.requests}

    first = await seeds()
    assert len(first) == len({seed for _, seed in first}) == 24
    assert await seeds(faults={3, 5}) == first
    assert not {seed for _, seed in await seeds("--rollout-seed", "7")} & {seed for _, seed in first}
    assert {seed for _, seed in await seeds("--no-rollout-sample-seeds")} == {None}


def nth(numbers, fault):
    """A fault on some requests, counted from 0."""
    return lambda number, _body: fault if number in numbers else None


@pytest.mark.parametrize(
    "fault", [500, 503, "reset", {"token_ids": [1], "logprobs": None, "finish_reason": "stop"}, "hang"], ids=str
)
async def test_a_faulty_engine_changes_nothing_about_the_finished_groups(sums, fault):
    flags = ("--over-sampling-batch-size", "6")
    async with StubEngine() as engine, sampler_of(sums(*flags), engine) as sampler:
        wanted = await sampler.generate(0)
    async with (
        StubEngine(fault=nth({1, 2, 9, 17}, fault), tokens_per_s=200) as first,
        StubEngine(tokens_per_s=200) as second,
        sampler_of(sums(*flags, nodes=2), first, second, waits=IMPATIENT) as sampler,
    ):
        rollout = await sampler.generate(0)
    assert_whole(rollout)
    assert [s.response_ids for s in rollout.samples] == [s.response_ids for s in wanted.samples]
    assert prompts_of(rollout) == prompts_of(wanted)
    assert rollout.metrics["rollout/request_retries"] > 0


async def test_an_engine_killed_in_the_middle_is_recovered_and_its_requests_are_repeated(sums):
    flags = ("--over-sampling-batch-size", "6")
    recovered = []
    async with StubEngine(tokens_per_s=20) as engine:

        async def recover(index, error):
            recovered.append((index, type(error).__name__))
            await asyncio.sleep(0.2)
            await engine.listen(engine.port)
            engine.tokens_per_s = None

        async with sampler_of(sums(*flags), engine, recover=recover) as sampler:
            round_ = asyncio.create_task(sampler.generate(0))
            await engine.has_requests(24)
            await engine.die()
            rollout = await round_
    assert_whole(rollout)
    assert recovered == [(0, "EngineUnreachable")]
    assert rollout.metrics["rollout/request_retries"] == 24
    assert [group.index for group in rollout.groups] == list(range(6))


async def test_the_time_limit_of_a_rollout_does_not_count_the_recovery_of_an_engine(sums):
    flags = ("--over-sampling-batch-size", "6", "--rollout-timeout", "3")
    async with StubEngine(tokens_per_s=20) as engine:

        async def recover(_index, _error):
            await asyncio.sleep(4)
            await engine.listen(engine.port)
            engine.tokens_per_s = None

        async with sampler_of(sums(*flags), engine, recover=recover) as sampler:
            round_ = asyncio.create_task(sampler.generate(0))
            await engine.has_requests(24)
            await engine.die()
            assert_whole(await round_)


async def test_a_rollout_that_an_engine_holds_up_names_it_and_blames_no_data(sums):
    waits = Patience(recovery=patience.ANSWER, stall=patience.ANSWER, watch=0.1, abort=patience.ANSWER)
    slow = sums("--rollout-timeout", "2")
    async with StubEngine(fault=lambda *_: "hang") as engine, sampler_of(slow, engine, waits=waits) as sampler:
        with pytest.raises(EngineTimeout, match=r"no token from engine 0 \(\d s\), within the limit of 2 s") as failure:
            await sampler.generate(0)
    assert failure.value.cause is Cause.CRASH


async def test_an_engine_that_came_back_with_old_weights_is_not_used_until_it_has_the_current_ones(sums):
    async with StubEngine(version="3", fault=nth({0}, "reset")) as engine:

        async def recover(_index, _error):
            engine.version = "default"
            asyncio.get_running_loop().call_later(0.4, setattr, engine, "version", "3")

        async with sampler_of(sums(), engine, recover=recover) as sampler:
            rollout = await sampler.generate(3)
    assert all(version == 3 for sample in rollout.samples for version in sample.weight_versions)


async def test_engines_with_different_weights_are_refused_before_a_rollout(sums):
    async with StubEngine(version="1") as a, StubEngine(version="2") as b, sampler_of(sums(nodes=2), a, b) as sampler:
        with pytest.raises(VimeError, match="engine 0: 1, engine 1: 2"):
            await sampler.generate(0)


async def test_an_engine_that_never_recovers_ends_the_run_with_its_failure(sums):
    waits = Patience(recovery=0.5)
    async with StubEngine(fault=lambda *_: "reset") as engine, sampler_of(sums(), engine, waits=waits) as sampler:

        async def die():
            await engine.has_requests(1)
            await engine.die()

        dead = asyncio.create_task(die())
        with pytest.raises(VimeError, match=engine.url):
            await sampler.generate(0)
        await dead


async def test_a_request_that_every_engine_refuses_ends_the_run_at_once(sums):
    async with StubEngine(fault=lambda *_: 400) as engine, sampler_of(sums(), engine) as sampler:
        with pytest.raises(EngineStatus, match="400"):
            await sampler.generate(0)
    assert len(engine.requests) <= 32


async def test_a_slow_engine_gets_fewer_groups(sums):
    plan = sums("--rollout-batch-size", "30", "--over-sampling-batch-size", "30", nodes=2)
    async with (
        StubEngine(holds=lambda _: True) as slow,
        StubEngine() as fast,
        sampler_of(plan, slow, fast, concurrency=8) as sampler,
    ):
        round_ = asyncio.create_task(sampler.generate(0))
        await fast.has_requests(28 * 4)
        slow.release()
        assert_whole(await round_, groups=30)
    assert len(slow.requests) == 8  # as many as its server takes at once
    assert len(fast.requests) == 28 * 4


async def test_a_slow_reward_keeps_no_other_group_waiting(sums):
    plan = sums("--rm-type", "reward_plugins:slow_on_odd", "--rollout-batch-size", "4")
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    # 4 samples of an odd sum take over a second in two workers; even ones are all done by then.
    assert sum(int(group.samples[0].label) % 2 for group in rollout.groups) <= 3


async def test_the_plugin_filter_and_the_group_reward_decide(sums):
    plan = sums("--dynamic-sampling-filter-path", "reward_plugins:keeps_even")
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert all(int(group.samples[0].label) % 2 == 0 for group in rollout.groups)
    plan = sums("--rm-type", "group:reward_plugins:rank_by_length")
    async with StubEngine(answer=sometimes_wrong) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    for group in rollout.groups:
        assert sorted(sample.reward for sample in group.samples) == [0.0, 1.0, 2.0, 3.0]


async def test_evaluation_gives_mean_reward_and_pass_at_k_of_every_set(sums):
    plan = sums("--n-samples-per-eval-prompt", "4", "--eval-temperature", "0.5", "--eval-max-response-len", "5")
    async with StubEngine(answer=sometimes_wrong) as engine, sampler_of(plan, engine) as sampler:
        metrics = await sampler.evaluate(0)
    assert metrics["eval/sums"] == 0.5
    assert metrics["eval/sums/pass@1"] == 0.5
    assert metrics["eval/sums/pass@2"] == pytest.approx(5 / 6)
    assert metrics["eval/sums/pass@4"] == 1.0
    assert len(engine.requests) == 160
    assert engine.requests[0]["sampling_params"]["temperature"] == 0.5
    assert engine.requests[0]["sampling_params"]["max_tokens"] == 5


async def test_every_evaluation_set_has_a_value_of_its_own(sums, tmp_path):
    path = tmp_path / "sums.jsonl"
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(path.read_text().replace('"label": "', '"label": "9'))
    plan = sums("--eval-prompt-data", "right", str(path), "wrong", str(wrong))
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        metrics = await sampler.evaluate(0)
    assert (metrics["eval/right"], metrics["eval/wrong"]) == (1.0, 0.0)
    assert (metrics["eval/right/pass@1"], metrics["eval/wrong/pass@1"]) == (1.0, 0.0)


async def test_stop_words_and_settings_reach_the_engine(sums):
    plan = sums(
        "--rollout-stop", "###", "--rollout-stop-token-ids", "7", "--rollout-top-p", "0.7", "--rollout-top-k", "5"
    )
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        await sampler.generate(0)
    sent = engine.requests[0]["sampling_params"]
    assert (sent["stop"], sent["stop_token_ids"], sent["top_p"], sent["top_k"]) == (["###"], [7], 0.7, 5)
    assert sent["detokenize"]


def test_settings_that_cannot_work_are_refused_before_anything_starts(sums):
    for flags, reason in (
        (("--rm-type", "deepscalar"), "deepscalar is unknown"),
        (("--rm-type", "remote"), "--rm-url"),
        (("--dynamic-sampling-filter-path", "nonzero"), "nonzero is unknown"),
        (("--rollout-temperature", "0"), "above 0"),
        (("--prompt-data", "/nowhere.jsonl"), "does not exist"),
    ):
        with pytest.raises(BadInput, match=reason):
            Sampler(sums(*flags), [EngineClient("http://nowhere", KEY)], tokenizer=CharacterTokenizer())


async def test_two_training_sets_share_a_rollout_by_weight_and_have_metrics_of_their_own(sums, tmp_path):
    for name, first in (("low", 0), ("high", 5)):
        rows = [{"prompt": f"{a}+{b}=", "label": str(a + b)} for a in range(first, first + 3) for b in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = ("--prompt-data", f"low={tmp_path}/low.jsonl:1", f"high={tmp_path}/high.jsonl:2")

    async def run(rollouts, state=None):
        plan = sums(*sets, "--over-sampling-batch-size", "6", "--max-staleness", "10")
        async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
            if state:
                sampler.load_state_dict(json.loads(json.dumps(state)))
            return [await sampler.generate(number) for number in range(rollouts)], sampler.state_dict()

    whole, _ = await run(4)
    first, state = await run(2)
    rest, _ = await run(2, state)
    assert [prompts_of(rollout) for rollout in whole] == [prompts_of(rollout) for rollout in (*first, *rest)]
    assert sum(int(prompt[0]) >= 5 for prompt in prompts_of(whole[0])) == 4
    assert whole[0].metrics["rollout/low/num_finished_groups"] == 2
    assert whole[0].metrics["rollout/high/raw_reward"] == 1.0


async def test_settled_prompts_are_left_out_and_counted(sums):
    plan = sums(
        "--skip-settled", "1", "--over-sampling-batch-size", "6", "--rollout-batch-size", "6", "--max-staleness", "99"
    )
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        rollouts = [await sampler.generate(number) for number in range(8)]  # 40 prompts, all of them solved always
    # Prompts of the round under way are not settled yet when their turn comes again.
    assert 34 <= sum(rollout.metrics["rollout/prompts_skipped"] for rollout in rollouts) <= 40


async def test_a_rollout_without_any_answer_is_warned_of_once(sums, caplog):
    plan = sums("--rm-type", "deepscaler", "--over-sampling-batch-size", "6", "--max-staleness", "99")
    async with StubEngine() as engine, sampler_of(plan, engine) as sampler:
        rollouts = [await sampler.generate(number) for number in range(2)]
    assert [rollout.metrics["rollout/no_answer_share"] for rollout in rollouts] == [1.0, 1.0]
    assert ["none has </think>" in record.message for record in caplog.records] == [True]


async def test_evaluation_measures_rows_that_training_leaves_out_and_counts_its_own(sums, tmp_path):
    rows = [{"prompt": "1+1=", "label": "2"}, {"prompt": "1+1+1=", "label": "3"}, {"prompt": "1+1+1+1=", "label": "4"}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--eval-prompt-data", "long", str(tmp_path / "long.jsonl"), "--rollout-max-prompt-len", "4")

    async def left_out(*more):
        async with StubEngine() as engine, sampler_of(sums(*flags, *more), engine) as sampler:
            return (await sampler.evaluate(0))["eval/long/prompts_too_long"]

    assert await left_out() == 0
    assert await left_out("--eval-max-prompt-len", "6") == 1
