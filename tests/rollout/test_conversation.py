"""A conversation: what is sampled and what is given stay apart, nothing is ever changed, limits hold."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_templates import FORGETS_THOUGHTS, MARKED, tokenizer_of
from tests.support.scripted import ScriptedDispatcher, session_of, settings_of
from vime.errors import BadInput, DataError
from vime.rollout.session import Aborted, BudgetSpent
from vime.samples import UNVERSIONED, Sample, Status

TOKENIZER = tokenizer_of(MARKED)
END = 0


def ids(text):
    return TOKENIZER([text], add_special_tokens=False)["input_ids"][0]


def turn(text, finish="stop"):
    """An answer as the engine gives it, with its end where it stopped by itself."""
    return ([*ids(text), *([END] if finish == "stop" else [])], finish)


def user(text):
    return [{"role": "user", "content": text}]


def tool(text):
    return {"role": "tool", "content": text, "name": "add"}


def conversation(*answers, template=MARKED, **limits):
    dispatcher = ScriptedDispatcher(answers)
    return dispatcher, session_of(settings_of(dispatcher, tokenizer_of(template), **limits))


def assert_whole(sample):
    """The spans of the turns follow one another, and every list has an entry a token."""
    assert len(sample.response_ids) == len(sample.log_probs) == len(sample.weight_versions) == len(sample.loss_mask)
    ends = [0, *(turn.end for turn in sample.turns)]
    assert [turn.start for turn in sample.turns] == ends[:-1]
    assert ends[-1] == len(sample.response_ids)
    for one in sample.turns:
        span = slice(one.start, one.end)
        assert set(sample.loss_mask[span]) <= {int(one.sampled)}
        assert all((version == UNVERSIONED) != one.sampled for version in sample.weight_versions[span])
        if not one.sampled:
            assert set(sample.log_probs[span]) <= {0.0}


TEXT = st.text(st.sampled_from("ab 01"), min_size=1, max_size=8)
STEPS = st.lists(
    st.tuples(
        TEXT,
        st.sampled_from(["stop", "length"]),
        st.one_of(TEXT.map(ids), TEXT.map(user), st.lists(TEXT.map(tool), min_size=1, max_size=3)),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_every_request_begins_with_all_that_was_there_and_only_sampled_tokens_are_trained_on(steps):
    async def hold():
        dispatcher, session = conversation(*(turn(said, finish) for said, finish, _ in steps))
        for number, (said, finish, given_now) in enumerate(steps):
            reply = await session.generate(max_tokens=len(ids(said)) + (finish == "stop"))
            assert reply.text == said
            assert reply.finish == finish
            if number < len(steps) - 1:
                session.give(given_now)
            assert_whole(session.sample)
        session.finish()
        return dispatcher, session.sample

    dispatcher, sample = asyncio.run(hold())
    everything = sample.prompt_ids + sample.response_ids
    for asked in dispatcher.asked:
        assert everything[: len(asked["token_ids"])] == asked["token_ids"]
    sampled = [token for token, mask in zip(sample.response_ids, sample.loss_mask, strict=True) if mask]
    assert sampled == [token for said, finish, _ in steps for token in turn(said, finish)[0]]
    assert sample.response == steps[-1][0]
    assert sample.status == (Status.TRUNCATED if steps[-1][1] == "length" else Status.COMPLETED)
    assert Sample.from_values(json.loads(json.dumps(sample.values()))).values() == sample.values()


async def test_messages_given_one_after_another_are_one_step():
    _, session = conversation(turn("call"), turn("3"))
    await session.generate()
    session.give([tool("1")])
    session.give([tool("2")])
    await session.generate()
    text = TOKENIZER.decode(session.sample.response_ids)
    assert text.count("<|start|>user") == 1
    assert text.count("<|start|>assistant") == 1
    assert [one.role for one in session.turns] == ["model", "tool", "model"]


async def test_a_stop_word_ends_a_turn_inside_and_the_template_writes_the_end():
    dispatcher, session = conversation((ids("a</call>"), "stop"), turn("done"))
    await session.generate(stop=["</call>"])
    assert dispatcher.asked[0]["settings"].stop == ("</call>",)
    session.give(user("b"))
    await session.generate()
    assert TOKENIZER.decode(session.sample.response_ids).startswith("a</call><|end|>\n<|start|>user\nb<|end|>")
    assert_whole(session.sample)


@pytest.mark.parametrize(
    ("limits", "answers", "what"),
    [
        ({"turns": 1}, [turn("a"), turn("b")], "turns"),
        ({"most": 20}, [turn("a"), turn("b")], "tokens"),
        ({"context": 60}, [turn("a"), turn("b" * 30)], "tokens"),
        ({"seconds": 0.0}, [turn("a")], "time"),
    ],
)
async def test_a_conversation_ends_truncated_where_a_budget_is_spent_and_says_which(limits, answers, what):
    _, session = conversation(*answers, **limits)

    async def hold():
        while True:
            await session.generate()
            session.give(user("on"))

    with pytest.raises(BudgetSpent, match=f"no {what} left"):
        await hold()
    with pytest.raises(BudgetSpent):
        await session.generate()
    session.finish()
    assert session.sample.status == Status.TRUNCATED
    assert len(session.sample.response_ids) <= session.settings.sampling.max_tokens
    assert_whole(session.sample)
    assert session.settings.counts.take().spent == {what: 1}
    assert session.settings.counts.spent == {}


async def test_a_turn_that_takes_too_long_ends_the_conversation():
    dispatcher = ScriptedDispatcher([turn("a")], seconds=30)
    session = session_of(settings_of(dispatcher, TOKENIZER, turn_seconds=0.05))
    async with asyncio.timeout(10):
        with pytest.raises(BudgetSpent, match="time"):
            await session.generate()


async def test_a_turn_has_its_own_limit_of_tokens_and_the_next_one_goes_on_behind_it():
    dispatcher, session = conversation(turn("abcdef"), turn("g"), turn_tokens=4)
    reply = await session.generate()
    assert (reply.text, reply.finish) == ("abcd", "length")
    session.give(user("on"))
    assert (await session.generate()).finish == "stop"
    assert dispatcher.asked[1]["max_tokens"] == 4


@pytest.mark.parametrize("finish", ["abort", "closed"])
async def test_an_aborted_conversation_goes_on_inside_its_turn(finish):
    first = [turn("a"), (ids("bc") if finish == "abort" else [], finish)]
    _, session = conversation(*first)
    await session.generate()
    session.give(user("x"))
    with pytest.raises(Aborted):
        await session.generate()
    with pytest.raises(Aborted):
        await session.generate()
    assert session.sample.status == Status.ABORTED
    kept = json.loads(json.dumps(session.sample.response_values()))
    sample = session.sample.without_response()
    sample.set_response(kept)

    dispatcher = ScriptedDispatcher([turn("de")])
    again = session_of(settings_of(dispatcher, TOKENIZER), sample)
    assert again.last_reply is None
    reply = await again.generate()
    assert reply.text == ("bcde" if finish == "abort" else "de")
    assert [one.role for one in sample.turns] == ["model", "user", "model"]
    assert_whole(sample)
    assert again.last_reply == reply


async def test_a_conversation_that_was_cut_while_a_tool_ran_goes_on_with_the_turn_that_called_it():
    _, session = conversation(turn("call"))
    reply = await session.generate()
    assert session.sample.status == Status.ABORTED
    again = session_of(session.settings, session.sample)
    assert again.last_reply == reply


async def test_history_that_the_template_would_write_otherwise_is_counted_or_refused():
    thought = turn("<think>\nhm\n</think>\n\na")
    _, session = conversation(thought, turn("b"), template=FORGETS_THOUGHTS)
    await session.generate()
    session.give(user("on"))
    await session.generate()
    counts = session.settings.counts.take()
    assert (counts.suffixes, counts.divergent) == (1, 1)

    _, strict = conversation(thought, turn("b"), template=FORGETS_THOUGHTS, divergence="refuse")
    await strict.generate()
    strict.give(user("on"))
    with pytest.raises(DataError, match="--on-template-divergence count"):
        await strict.generate()


async def test_a_branch_is_a_sample_of_its_own_with_the_number_of_its_conversation():
    dispatcher, session = conversation(turn("a"), turn("sub"), turn("b"))
    session.settings.seed = 5
    await session.generate()
    side = session.branch(user("other"))
    await side.generate()
    session.give(user("on"))
    await session.generate()
    session.finish()
    assert (side.sample.index, side.sample.branch) == (session.sample.index, 1)
    assert side.sample.response == "sub"
    assert side.sample.status == Status.COMPLETED
    assert side.sample.prompt_ids != session.sample.prompt_ids
    assert len({asked["seed"] for asked in dispatcher.asked}) == 3
    assert_whole(side.sample)


async def test_a_conversation_may_begin_with_other_messages_and_begins_again_with_the_data_sets():
    _, session = conversation(turn("a"))
    before = list(session.sample.prompt_ids)
    session.start([{"role": "system", "content": "s"}, *user("q")])
    await session.generate()
    kept = json.loads(json.dumps(session.sample.response_values()))
    fresh = session.sample.without_response()
    assert fresh.prompt_ids == before
    fresh.set_response(kept)
    assert fresh.prompt_ids == session.sample.prompt_ids != before
    assert fresh.without_response().prompt_ids == before
    with pytest.raises(BadInput, match="before its first turn"):
        session.start(user("q"))


async def test_ids_and_messages_are_not_mixed_in_a_step_and_the_model_speaks_first():
    _, session = conversation(turn("a"))
    with pytest.raises(BadInput, match=r"begin with other messages by session\.start"):
        session.give(user("x"))
    await session.generate()
    session.give(user("x"))
    with pytest.raises(BadInput, match="either token ids or messages"):
        session.give([1, 2])


async def test_the_use_of_a_tool_is_measured_and_its_failure_named():
    _, session = conversation(turn("a"))
    with session.tool("add"):
        await asyncio.sleep(0.01)
    with session.tool("run") as use:
        use.error = "timeout"
    with pytest.raises(ValueError, match="no"), session.tool("run"):
        raise ValueError("no")
    assert [(use.name, use.error) for use in session.sample.tools] == [
        ("add", ""),
        ("run", "timeout"),
        ("run", "ValueError"),
    ]
    assert session.sample.tools[0].seconds >= 0.01


async def test_the_parser_gets_a_turn_without_its_end():
    dispatcher, session = conversation(turn("ab"), ([END], "stop"))
    dispatcher.parsed = lambda token_ids: {"role": "assistant", "content": TOKENIZER.decode(token_ids)}
    assert (await session.message(await session.generate()))["content"] == "ab"
    session.give(user("on"))
    assert await session.message(await session.generate()) == {"role": "assistant", "content": ""}
