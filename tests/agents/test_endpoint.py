"""The endpoint of a conversation, asked by the clients that agents use; a session behind it keeps every id."""

import asyncio
import stat

import aiohttp
import anthropic
import openai
import pytest

from tests.support.chat_templates import MARKED, TOOL, tokenizer_of
from tests.support.scripted import ScriptedDispatcher, session_of, settings_of
from tests.support.stub_engine import StubEngine
from vime.agents.endpoint import endpoint
from vime.samples import Status

TOKENIZER = tokenizer_of(MARKED)
ASKED = [{"role": "user", "content": "2+3?"}]


def ids(text):
    return TOKENIZER([text], add_special_tokens=False)["input_ids"][0]


def turn(text):
    return ([*ids(text), 0], "stop")


def calling(token_ids):
    """A call of `add`, as an engine's parser reads the turn `call`."""
    text = TOKENIZER.decode(token_ids, skip_special_tokens=True)
    if not text.startswith("call"):
        return {"role": "assistant", "content": text}
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    return {"role": "assistant", "content": text.removeprefix("call"), "tool_calls": [call]}


def conversation(*answers, **limits):
    dispatcher = ScriptedDispatcher([turn(text) for text in answers])
    dispatcher.parsed = calling
    return session_of(settings_of(dispatcher, TOKENIZER, **limits))


def lines(session):
    """Texts of the conversation's tokens, branch by branch: prompt, then response."""
    samples = [session.sample, *(branch.sample for branch in session.branches)]
    return [(TOKENIZER.decode(s.prompt_ids), TOKENIZER.decode(s.response_ids)) for s in samples]


def openai_client(local):
    return openai.AsyncOpenAI(base_url=f"{local.url}/v1", api_key=local.key, max_retries=0)


def anthropic_client(local):
    return anthropic.AsyncAnthropic(base_url=local.url, api_key=local.key, max_retries=0)


@pytest.mark.parametrize("stream", [False, True])
async def test_openais_client_calls_a_tool_and_every_id_is_kept(stream):
    session = conversation("call", "5")
    messages = list(ASKED)

    async def ask(client):
        if not stream:
            answer = await client.chat.completions.create(model="any", messages=messages, tools=[TOOL])
            return answer.choices[0].message.model_dump(exclude_none=True), answer.choices[0].finish_reason
        message, finish = {"role": "assistant", "content": ""}, None
        asked = await client.chat.completions.create(model="any", messages=messages, tools=[TOOL], stream=True)
        async for chunk in asked:
            delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason
            message["content"] += delta.content or ""
            for call in delta.tool_calls or ():
                message.setdefault("tool_calls", []).append(call.model_dump(exclude={"index"}))
        return message, finish

    async with endpoint(session) as local, openai_client(local) as client:
        message, finish = await ask(client)
        assert finish == "tool_calls"
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 2, "b": 3}'}
        messages += [message, {"role": "tool", "tool_call_id": "c1", "content": "5"}]
        message, finish = await ask(client)
    assert (message["content"], finish) == ("5", "stop")
    ((prompt, response),) = lines(session)
    assert prompt.startswith("<|start|>system\nTools: ")
    assert prompt.endswith("<|start|>user\n2+3?<|end|>\n<|start|>assistant\n")
    told = "\n<|start|>user\n<tool_response>\n5\n</tool_response><|end|>\n<|start|>assistant\n"
    assert response == f"call<|end|>{told}5<|end|>"
    sampled = [token for token, mask in zip(session.sample.response_ids, session.sample.loss_mask, strict=True) if mask]
    assert sampled == [*ids("call"), 0, *ids("5"), 0]


@pytest.mark.parametrize("stream", [False, True])
async def test_anthropics_client_calls_a_tool_and_every_id_is_kept(stream):
    session = conversation("call", "5")
    tool = {"name": "add", "description": "adds", "input_schema": {"type": "object"}}
    messages = list(ASKED)

    async def ask(client):
        wanted = {"model": "any", "max_tokens": 100, "system": "be brief", "messages": messages, "tools": [tool]}
        if not stream:
            return await client.messages.create(**wanted)
        async with client.messages.stream(**wanted) as asked:
            return await asked.get_final_message()

    async with endpoint(session) as local, anthropic_client(local) as client:
        answer = await ask(client)
        assert answer.stop_reason == "tool_use"
        (use,) = [block for block in answer.content if block.type == "tool_use"]
        assert (use.name, use.input) == ("add", {"a": 2, "b": 3})
        messages += [
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "5"}]},
        ]
        answer = await ask(client)
    assert answer.stop_reason == "end_turn"
    assert answer.content[0].text == "5"
    ((prompt, response),) = lines(session)
    assert "<|start|>system\nbe brief<|end|>" in prompt
    assert response.startswith("call<|end|>\n<|start|>user\n<tool_response>\n5\n")
    assert response.endswith("<|start|>assistant\n5<|end|>")


async def test_subagents_and_compacted_histories_are_branches_and_the_main_line_goes_on():
    session = conversation("plan", "found", "answer", "more")
    async with endpoint(session) as local, openai_client(local) as client:

        async def ask(*messages):
            answer = await client.chat.completions.create(model="m", messages=list(messages))
            return {"role": "assistant", "content": answer.choices[0].message.content}

        first = await ask(*ASKED)
        await ask({"role": "system", "content": "you search"}, {"role": "user", "content": "find it"})
        second = await ask(*ASKED, first, {"role": "user", "content": "it is found"})
        await ask({"role": "user", "content": "so far: a plan"}, second, {"role": "user", "content": "go on"})
    session.finish()
    main, search, compacted = lines(session)
    assert main[1].startswith("plan<|end|>\n<|start|>user\nit is found")
    assert main[1].endswith("answer<|end|>")
    assert search[1] == "found<|end|>"
    assert "so far: a plan" in compacted[0]
    assert "answer" in compacted[0]
    assert [branch.sample.branch for branch in session.branches] == [1, 2]
    assert {branch.sample.status for branch in session.branches} == {Status.COMPLETED}
    # What a compacted history quotes is part of its prompt, and nobody trains on it.
    assert sum(session.branches[1].sample.loss_mask) == len("more") + 1


async def test_two_requests_of_one_history_at_once_are_two_branches():
    session = conversation("a", "b")
    async with endpoint(session) as local, openai_client(local) as client:
        answers = await asyncio.gather(*(client.chat.completions.create(model="m", messages=ASKED) for _ in range(2)))
    assert sorted(answer.choices[0].message.content for answer in answers) == ["a", "b"]
    assert len(session.branches) == 1


async def test_a_spent_budget_is_an_error_that_clients_do_not_repeat():
    session = conversation("a", "b", turns=1)
    async with endpoint(session) as local, openai_client(local) as client:
        first = await client.chat.completions.create(model="m", messages=ASKED, max_tokens=50, stop=["x"])
        history = [*ASKED, {"role": "assistant", "content": first.choices[0].message.content}, *ASKED]
        with pytest.raises(openai.BadRequestError, match="no turns left") as refused:
            await client.chat.completions.create(model="m", messages=history)
    assert refused.value.code == "no_turns_left"
    session.finish()
    assert session.sample.status == Status.TRUNCATED
    asked = session.settings.dispatcher.asked[0]
    assert (asked["max_tokens"], asked["settings"].stop) == (50, ("x",))


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/chat/completions", {"messages": []}, "none that the model could answer"),
        ("/v1/chat/completions", {"messages": ASKED, "n": 2}, "one answer a request"),
        ("/v1/chat/completions", {"messages": "hi"}, "messages is str, not a list"),
        ("/v1/chat/completions", [1], "no JSON object"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "kind image cannot be read"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": 4}]}, "content is int, not text"),
    ],
)
async def test_what_it_cannot_do_is_refused_with_words(path, body, words):
    session = conversation("a")
    async with endpoint(session) as local, aiohttp.ClientSession() as client:
        headers = {"Authorization": f"Bearer {local.key}"}
        async with client.post(local.url + path, json=body, headers=headers) as answer:
            assert answer.status == 400
            assert words in await answer.text()
    assert session.turns == []


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer x"}, {"x-api-key": ""}])
async def test_without_the_conversations_key_nothing_is_answered(headers):
    session, other = conversation("a"), conversation("b")
    async with endpoint(session) as local, endpoint(other) as another, aiohttp.ClientSession() as client:
        assert another.key != local.key
        for given in (headers, {"x-api-key": another.key}):
            asked = client.post(f"{local.url}/v1/messages", json={"messages": ASKED}, headers=given)
            async with asked as answer:
                assert answer.status == 401
        assert local.key not in repr(local)
    assert session.turns == []


async def test_it_listens_on_loopback_alone_or_on_a_private_socket(tmp_path):
    session = conversation("a")
    path = tmp_path / "s" / "model.sock"
    async with endpoint(session, socket=path) as local:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        connector = aiohttp.UnixConnector(str(path))
        headers = {"x-api-key": local.key}
        async with (
            aiohttp.ClientSession(connector=connector) as client,
            client.post("http://localhost/v1/messages", json={"messages": ASKED}, headers=headers) as answer,
        ):
            assert (await answer.json())["content"] == [{"type": "text", "text": "a"}]
    async with endpoint(session) as local:
        assert local.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("processes", ["0", "1"])
async def test_a_function_lets_a_program_speak_with_the_model(chats, sampler_of, processes):
    plan = chats("--custom-generate-function-path", "agent_plugins:by_client", "--agent-processes", processes)
    async with StubEngine(answer=lambda *_: [*ids("5"), 0]) as engine, sampler_of(plan, engine) as sampler:
        rollout = await sampler.generate(0)
    assert len(rollout.samples) == 16
    for group in rollout.groups:
        assert [sample.branch for sample in group.samples] == [0, 1, 0, 1]
        assert {sample.reward for sample in group.samples} == {0.25}
        assert "aside" in TOKENIZER.decode(group.samples[1].prompt_ids)
        assert [turn.role for turn in group.samples[0].turns] == ["model", "user", "model"]
