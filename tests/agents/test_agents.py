"""Functions and environments that hold conversations in rollouts of a stub engine, in the driver's loop and outside."""

import asyncio

import pytest

from tests.support import patience
from tests.support.chat_templates import MARKED, tokenizer_of
from tests.support.stub_engine import StubEngine
from vime.agents.choose import agent_of
from vime.errors import BadInput, DataError
from vime.samples import UNVERSIONED, Status

TOKENIZER = tokenizer_of(MARKED)
INSIDE, OUTSIDE = ("--agent-processes", "0"), ("--agent-processes", "1")
BOTH = pytest.mark.parametrize("where", [INSIDE, OUTSIDE], ids=["driver", "processes"])


def ids(text):
    return TOKENIZER([text], add_special_tokens=False)["input_ids"][0]


def adds(token_ids, _number=0):
    """The sum that is asked for, whatever was said since."""
    text = TOKENIZER.decode(token_ids).partition("user\n")[2].removeprefix("guess ")
    question = text.partition("=")[0].partition("<")[0]
    return [*ids(str(sum(int(part) for part in question.split("+") if part.isdecimal()))), 0]


def function(name):
    return ("--custom-generate-function-path", f"agent_plugins:{name}")


def environment(name):
    return ("--environment", f"agent_plugins:{name}")


def spans(sample):
    """(role, text of the tokens, mask) of every turn."""
    return [
        (
            turn.role,
            TOKENIZER.decode(sample.response_ids[turn.start : turn.end]),
            set(sample.loss_mask[turn.start : turn.end]),
        )
        for turn in sample.turns
    ]


@BOTH
async def test_a_function_holds_the_conversation_and_its_last_turn_is_graded(chats, sampler_of, where):
    async with StubEngine(answer=adds) as engine, sampler_of(chats(*function("asks_twice"), *where), engine) as sampler:
        rollout = await sampler.generate(0)
    for sample in rollout.samples:
        said = f"{sample.label}<|end|>"
        asked = f"\n<|start|>user\nsure about {sample.label}?<|end|>\n<|start|>assistant\n"
        assert spans(sample) == [("model", said, {1}), ("user", asked, {0}), ("model", said, {1})]
        assert (sample.response, sample.reward, sample.status) == (sample.label, 1.0, Status.COMPLETED)
        assert len(sample.response_ids) == len(sample.log_probs) == len(sample.weight_versions)
    assert rollout.metrics["rollout/turns"] == 2.0
    assert 0.5 < rollout.metrics["rollout/given_share"] < 1
    assert rollout.metrics["rollout/template_divergence"] == 0.0
    assert rollout.metrics["rollout/staleness"] == 0.0
    requests = [request["token_ids"] for request in engine.requests]
    for second in (request for request in requests if "sure about" in TOKENIZER.decode(request)):
        assert any(second[: len(first)] == first for first in requests if first != second)


@BOTH
async def test_an_environment_begins_steps_rewards_and_is_measured(chats, sampler_of, where):
    def right_at_the_second(token_ids, _number):
        return adds(token_ids) if "try 1" in TOKENIZER.decode(token_ids) else [*ids("99"), 0]

    plan = chats(*environment("Guess"), *where)
    async with StubEngine(answer=right_at_the_second) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    for sample in rollout.samples:
        assert sample.reward == 1.25
        assert (
            TOKENIZER.decode(sample.prompt_ids) == f"<|start|>user\nguess {sample.label}<|end|>\n<|start|>assistant\n"
        )
        assert [use.name for use in sample.tools] == ["scale", "scale"]
    assert rollout.metrics["rollout/tool/scale/calls"] == 16.0
    assert rollout.metrics["rollout/tool/scale/seconds"] >= 0.001
    assert rollout.metrics["rollout/tool_errors"] == 0.0


@BOTH
async def test_branches_are_samples_of_one_conversation_with_its_reward(chats, sampler_of, where):
    plan = chats(*function("with_a_branch"), *where)
    async with StubEngine(answer=lambda *_: [*ids("x"), 0]) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert len(rollout.samples) == 16
    for group in rollout.groups:
        assert [(sample.index - group.samples[0].index, sample.branch) for sample in group.samples] == [
            (0, 0), (0, 1), (1, 0), (1, 1),
        ]  # fmt: skip
        assert {sample.reward for sample in group.samples} == {0.5}
        assert "aside" in TOKENIZER.decode(group.samples[1].prompt_ids)
        assert [turn.role for turn in group.samples[1].turns] == ["model", "user", "model"]
    assert rollout.metrics["rollout/branches"] == 8.0


@pytest.mark.parametrize(
    ("name", "where"),
    [("fails_on_seven", INSIDE), ("fails_on_seven", OUTSIDE), ("dies_on_seven", OUTSIDE), ("marks_seven", INSIDE)],
)
async def test_a_conversation_that_fails_is_counted_and_its_group_left_out(chats, sampler_of, where, name):
    """Others that were in a process that died begin again."""
    flags = ("--rollout-batch-size", "22", "--over-sampling-batch-size", "24", "--rollout-timeout", str(patience.GROUP))
    plan = chats(*function(name), *where, *flags)
    async with StubEngine(answer=adds) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert "7" not in {sample.label for sample in rollout.samples}
    # The round may be full before the last one has failed.
    assert 2.0 <= rollout.metrics["rollout/agent_failures"] <= 4.0
    assert 1.0 <= rollout.metrics["rollout/failed_groups"] <= 2.0
    assert len(rollout.groups) == 22


async def test_a_function_that_always_fails_ends_the_run_with_its_words(chats, sampler_of):
    async with (
        StubEngine(answer=adds) as engine,
        sampler_of(chats(*function("always_fails"), *OUTSIDE), engine) as sampler,
    ):
        with pytest.raises(DataError, match=r"of \d+ conversations failed, more than 10%; .* raised ValueError: never"):
            await sampler.generate(0)


@BOTH
async def test_a_function_that_swallows_the_end_still_ends(chats, sampler_of, where):
    plan = chats(*function("swallows"), *where, "--max-turns", "3")
    async with StubEngine(answer=adds) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert {len([t for t in sample.turns if t.sampled]) for sample in rollout.samples} == {3}
    assert {sample.status for sample in rollout.samples} == {Status.TRUNCATED}
    assert rollout.metrics["rollout/out_of_turns"] == 8.0


async def test_a_function_that_blocks_its_process_is_ended_by_the_conversations_time(chats, sampler_of):
    flags = ("--rollout-batch-size", "20", "--over-sampling-batch-size", "20", "--conversation-timeout", "2")
    plan = chats(*function("blocks_on_seven"), "--agent-processes", "1", *flags)
    async with StubEngine(answer=adds) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert rollout.metrics["rollout/out_of_time"] >= 2.0


@BOTH
@pytest.mark.parametrize(
    ("way", "resumed"),
    [
        (environment("Guess"), True),
        (environment("Forgetful"), False),
        (function("goes_on"), True),
        (function("asks_twice"), False),
    ],
)
async def test_an_aborted_conversation_goes_on_where_it_was_or_begins_again_and_is_counted(
    chats, sampler_of, where, way, resumed
):
    """The second turn of half of the conversations is held until the round is full, across a checkpoint."""
    plan = chats(*way, *where, "--partial-rollout", "--rollout-batch-size", "2")

    def second_of_odd(token_ids):
        text = TOKENIZER.decode(token_ids)
        return text.count("<|start|>assistant") == 2 and adds(token_ids)[0] % 2 == 1

    wrong = lambda *_: [*ids("99"), 0]  # noqa: E731
    async with StubEngine(answer=wrong, holds=second_of_odd) as engine, sampler_of(plan, engine) as sampler:
        await sampler.generate(0)
        state = sampler.state_dict()
    kept = [sample for group in state["kept"] for sample in group["samples"]]
    assert any(sample["turns"] for sample in kept)
    async with StubEngine(answer=wrong) as engine, sampler_of(plan, engine) as sampler:
        sampler.load_state_dict(state)
        rollout = await sampler.generate(1)
    second = [r for r in engine.requests if TOKENIZER.decode(r["token_ids"]).count("<|start|>assistant") >= 2]
    assert bool(rollout.metrics["rollout/conversations_dropped"]) != resumed
    # A conversation that goes on asks for no first turn again.
    assert (engine.requests[0] in second) == resumed
    for sample in rollout.samples:
        assert all(
            (version == UNVERSIONED) != mask
            for version, mask in zip(sample.weight_versions, sample.loss_mask, strict=True)
        )
        if "Guess" in way[1]:
            assert sample.reward == -0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (function("not_async"), "write async def generate"),
        (function("missing"), "defines no missing: correct the name"),
        (environment("asks_twice"), "no class of vime.agents.environment.Environment"),
    ],
)
async def test_a_name_of_the_wrong_kind_is_refused_at_the_start(chats, flags, words):
    async def start(where):
        agent = agent_of(chats(*flags, *where).recipe)
        assert agent is not None
        async with asyncio.timeout(60), agent:
            pass

    for where in (INSIDE, OUTSIDE):
        with pytest.raises(BadInput, match=words):
            await start(where)
