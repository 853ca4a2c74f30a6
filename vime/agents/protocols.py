"""Chat requests and answers as OpenAI's and Anthropic's clients write and read them: pure functions of plain values."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vime.errors import BadInput

MODEL = "policy"
"""Name of the model in answers; any name is taken."""


@dataclass(frozen=True)
class Ask:
    """A request for the next turn, whichever protocol it came by. Messages are those of a chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    max_tokens: int | None
    stop: list[str]
    stream: bool


@dataclass(frozen=True)
class Answered:
    """A turn of the model as a message, how it ended, and tokens of prompt and turn."""

    message: dict[str, Any]
    finish: str
    prompt_tokens: int
    tokens: int

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tools that it calls, as OpenAI writes them."""
        return self.message.get("tool_calls") or []


class Protocol:
    """One protocol: reading a request, writing an answer whole or as events."""

    @staticmethod
    def read(body: Mapping[str, Any]) -> Ask:
        """Raises BadInput for what the endpoint cannot do."""
        raise NotImplementedError

    @staticmethod
    def write(answered: Answered) -> dict[str, Any]:
        """The answer as a whole."""
        raise NotImplementedError

    @staticmethod
    def events(answered: Answered) -> Iterator[str]:
        """The answer as server-sent events."""
        raise NotImplementedError

    @staticmethod
    def error(text: str, kind: str) -> dict[str, Any]:
        """An error as the client reads it."""
        raise NotImplementedError


class OpenAIChat(Protocol):
    """`POST /v1/chat/completions`."""

    @staticmethod
    def read(body: Mapping[str, Any]) -> Ask:
        if body.get("n") not in (None, 1):
            raise BadInput(f"n is {body['n']!r}: one answer a request; ask again for a branch")
        stop = body.get("stop") or []
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        tools = [] if body.get("tool_choice") == "none" else _list(body, "tools")
        messages = [_openai_message(message) for message in _list(body, "messages")]
        return Ask(messages, tools, most, [stop] if isinstance(stop, str) else list(stop), bool(body.get("stream")))

    @staticmethod
    def write(answered: Answered) -> dict[str, Any]:
        message = {**answered.message, "content": answered.message["content"] or None}
        choice = {"index": 0, "message": message, "finish_reason": _openai_finish(answered), "logprobs": None}
        used = {
            "prompt_tokens": answered.prompt_tokens,
            "completion_tokens": answered.tokens,
            "total_tokens": answered.prompt_tokens + answered.tokens,
        }
        return {**_openai_head("chat.completion"), "choices": [choice], "usage": used}

    @staticmethod
    def events(answered: Answered) -> Iterator[str]:
        head = _openai_head("chat.completion.chunk")
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        for name in ("reasoning", "content"):
            if answered.message.get(name):
                deltas.append({name: answered.message[name]})
        if answered.calls:
            deltas.append({"tool_calls": [{"index": number, **call} for number, call in enumerate(answered.calls)]})
        finish = _openai_finish(answered)
        for delta, reason in [*((delta, None) for delta in deltas), ({}, finish)]:
            chunk = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
            yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    @staticmethod
    def error(text: str, kind: str) -> dict[str, Any]:
        return {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": kind}}


class AnthropicMessages(Protocol):
    """`POST /v1/messages`."""

    @staticmethod
    def read(body: Mapping[str, Any]) -> Ask:
        messages: list[dict[str, Any]] = []
        if body.get("system"):
            messages.append({"role": "system", "content": _text(body["system"])})
        for message in _list(body, "messages"):
            messages += _anthropic_messages(message)
        kind = (body.get("tool_choice") or {}).get("type")
        tools = [] if kind == "none" else [_anthropic_tool(tool) for tool in _list(body, "tools")]
        return Ask(messages, tools, body.get("max_tokens"), _list(body, "stop_sequences"), bool(body.get("stream")))

    @staticmethod
    def write(answered: Answered) -> dict[str, Any]:
        head = _anthropic_head(answered)
        return {**head, "content": _anthropic_blocks(answered), "stop_reason": _anthropic_finish(answered)}

    @staticmethod
    def events(answered: Answered) -> Iterator[str]:
        head = {**_anthropic_head(answered), "content": [], "stop_reason": None}
        yield _event("message_start", message=head)
        for index, block in enumerate(_anthropic_blocks(answered)):
            if block["type"] == "text":
                begin, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
            else:
                begin, delta = {**block, "input": {}}, {"type": "input_json_delta"}
                delta["partial_json"] = json.dumps(block["input"])
            yield _event("content_block_start", index=index, content_block=begin)
            yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        end = {"stop_reason": _anthropic_finish(answered), "stop_sequence": None}
        yield _event("message_delta", delta=end, usage={"output_tokens": answered.tokens})
        yield _event("message_stop")

    @staticmethod
    def error(text: str, kind: str) -> dict[str, Any]:
        return {"type": "error", "error": {"type": "invalid_request_error", "message": f"{kind}: {text}"}}


def same_message(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two messages say the same, however a client wrote them down in between."""
    return _said(one) == _said(other)


def _said(message: Mapping[str, Any]) -> tuple[Any, ...]:
    calls = [
        (call["function"]["name"], _plain(call["function"].get("arguments")))
        for call in message.get("tool_calls") or ()
    ]
    return message.get("role"), (message.get("content") or "").strip(), calls


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: arguments of calls as mappings, tools' names beside their answers."""
    names: dict[Any, str] = {}
    found: list[dict[str, Any]] = []
    for message in messages:
        shown = dict(message)
        if calls := message.get("tool_calls"):
            names |= {call.get("id"): call["function"]["name"] for call in calls}
            shown["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _plain(call["function"].get("arguments"))}}
                for call in calls
            ]
        if message.get("role") == "tool" and "name" not in message:
            shown["name"] = names.get(message.get("tool_call_id"), "tool")
        found.append(shown)
    return found


def _plain(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments or "{}")
    except json.JSONDecodeError:
        return arguments


def _list(body: Mapping[str, Any], name: str) -> list[Any]:
    value = body.get(name) or []
    if not isinstance(value, list):
        raise BadInput(f"{name} is {type(value).__name__}, not a list")
    return value


def _text(content: Any) -> str:
    """Text of a content that is text, or blocks of text. Raises BadInput for images and other kinds."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        other = [str(block.get("type")) for block in content if block.get("type") != "text"]
        if not other:
            return "".join(block["text"] for block in content)
        raise BadInput(f"content of the kind {other[0]} cannot be read here: give text")
    raise BadInput(f"content is {type(content).__name__}, not text")


def _openai_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadInput("a message has no role")
    role = "system" if message["role"] == "developer" else message["role"]
    kept = {name: message[name] for name in ("tool_calls", "tool_call_id", "name") if message.get(name)}
    return {"role": role, "content": _text(message.get("content")), **kept}


def _openai_head(kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": MODEL}


def _openai_finish(answered: Answered) -> str:
    return "tool_calls" if answered.calls else answered.finish


def _anthropic_messages(message: Any) -> list[dict[str, Any]]:
    """One message of Anthropic's is several of a template where it holds results of tools."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadInput("a message has no role")
    content, role = message.get("content"), message["role"]
    if not isinstance(content, list):
        return [{"role": role, "content": _text(content)}]
    results = [
        {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": _text(block.get("content"))}
        for block in content
        if block.get("type") == "tool_result"
    ]
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block["input"])},
        }
        for block in content
        if block.get("type") == "tool_use"
    ]
    rest = [block for block in content if block.get("type") not in ("tool_result", "tool_use", "thinking")]
    if not rest and not calls:
        return results
    return [*results, {"role": role, "content": _text(rest), **({"tool_calls": calls} if calls else {})}]


def _anthropic_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": tool["input_schema"]}
    return {"type": "function", "function": function}


def _anthropic_head(answered: Answered) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "stop_sequence": None,
        "usage": {"input_tokens": answered.prompt_tokens, "output_tokens": answered.tokens},
    }


def _anthropic_blocks(answered: Answered) -> list[dict[str, Any]]:
    text = answered.message["content"]
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not answered.calls else []
    for call in answered.calls:
        given = _plain(call["function"].get("arguments"))
        given = given if isinstance(given, dict) else {"text": given}
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": given})
    return blocks


def _anthropic_finish(answered: Answered) -> str:
    return "tool_use" if answered.calls else {"length": "max_tokens"}.get(answered.finish, "end_turn")


def _event(kind: str, **content: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **content})}\n\n"
