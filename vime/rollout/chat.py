"""Messages that a conversation is given, rendered as token ids that follow what is there already.

The history is never rendered again: a chat template is asked for a stand-in conversation of one question and one
answer, with the new messages behind them, and what it writes behind the answer is the suffix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vime.errors import BadInput

Message = Mapping[str, Any]
"""A chat message: `role`, `content`, and for an answer of a tool `tool_call_id` and `name`."""

_ANSWER = "7f3aStandInAnswer"
_THOUGHT = "7f3aStandInThought"
_THINK, _THINK_END = "<think>", "</think>"
_WRAPPER = "transformers.tokenization_utils_tokenizers"
"""Module of the class that wraps the tokenizers library's."""
_GIVEN_ROLES = ("user", "tool", "system", "developer")


@dataclass(frozen=True)
class Suffix:
    """Text of the template between the model's last turn and its next one."""

    token_ids: list[int]
    diverges: bool
    """Whether the template, given the whole conversation, would have written other text for what came before."""


@dataclass(frozen=True)
class _Shape:
    """Key of the stand-in conversation: everything that decides how a template writes it."""

    roles: tuple[str, ...]
    tools: tuple[str, ...]
    """Names of the tools that answer."""
    thought: bool
    """Whether the model's turn holds `</think>`."""


@dataclass
class ChatTemplate:
    """The chat template of a checkpoint's tokenizer. `arguments` are its variables, as for the prompts."""

    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stop_token_ids: Sequence[int] = ()
    """Tokens that end a turn, besides the tokenizer's end of text."""

    def __post_init__(self) -> None:
        end = getattr(self.tokenizer, "eos_token_id", None)
        self.stops = frozenset([*([] if end is None else [int(end)]), *self.stop_token_ids])
        """Token ids that end a turn."""
        self._encode, self._decode = _encoder(self.tokenizer), _decoder(self.tokenizer)
        self._before: dict[_Shape, tuple[str, str]] = {}
        self._diverges: dict[_Shape, bool] = {}
        special = [text for text in getattr(self.tokenizer, "all_special_tokens", ()) if len(text) > 1]
        longest = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest))) if longest else None

    def prompt(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation's beginning, up to where the model's first turn starts. Raises BadInput."""
        given = {"tools": list(tools)} if tools else {}
        return self._ids(self._render([dict(message) for message in messages], True, **given))

    def suffix(self, messages: Sequence[Message], *, last_id: int | None, thought: bool = False) -> Suffix:
        """Token ids of messages behind a turn of the model that ended with the token `last_id`.

        An end-of-turn token that the model sampled is not written a second time; one that it did not sample (a turn cut
        short, or ended by a stop word) is. Special tokens' names inside a message stay text. `thought`: the turn holds
        `</think>`. Raises BadInput for messages that the template refuses.
        """
        given = [self._plain(message) for message in messages]
        shape = _Shape(tuple(m["role"] for m in given), tuple(_tool_names(given)), thought)
        text, skipped = self._written(given, shape)
        ids = self._ids(text)
        if last_id in self.stops and ids and ids[0] in self.stops:
            ids = ids[1:]
        if shape not in self._diverges:
            self._diverges[shape] = skipped or self._is_other(given, shape, text)
        return Suffix(ids, self._diverges[shape])

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self._decode(token_ids)

    def _plain(self, message: Message) -> dict[str, Any]:
        role = message.get("role")
        if role not in _GIVEN_ROLES:
            raise BadInput(f"a conversation is given messages of the roles {', '.join(_GIVEN_ROLES)}, not {role!r}")
        content = message.get("content")
        if not isinstance(content, str):
            raise BadInput(f"the content of a {role} message is {type(content).__name__}, not text")
        if self._special is not None:
            # A tool's output must not be able to end the turn or to speak for the user.
            content = self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", content)
        return {**message, "content": content}

    def _written(self, given: list[dict[str, Any]], shape: _Shape) -> tuple[str, bool]:
        """Text behind the answer's own words: its end, the messages, the next turn's beginning.

        True if the template wrote the answer's tool calls otherwise than without the messages.
        """
        if shape not in self._before:
            behind = self._behind(self._stand_in(shape), False)
            end = max((behind.rfind(text) for text in self._stop_texts()), default=-1)
            # Without an end of turn, all that the template writes is taken for it.
            cut = end if end >= 0 else 0
            self._before[shape] = behind[:cut], behind[cut:]
        calls, _ = self._before[shape]
        behind = self._behind([*self._stand_in(shape), *given], True)
        if behind.startswith(calls):
            return behind[len(calls) :], False
        found = [at for text in self._stop_texts() if (at := behind.find(text)) >= 0]
        if not found:
            raise BadInput("the chat template writes an answer with tool calls otherwise once their results follow")
        return behind[min(found) :], True

    def _behind(self, messages: list[dict[str, Any]], goes_on: bool) -> str:
        text = self._render(messages, goes_on)
        place = text.rfind(_ANSWER)
        if place < 0:
            raise BadInput("the chat template leaves out the model's answer: no conversation can go on with it")
        return text[place + len(_ANSWER) :]

    def _is_other(self, given: list[dict[str, Any]], shape: _Shape, text: str) -> bool:
        """Whether the stand-in conversation as a whole is other text than its parts behind one another."""
        question = self._stand_in(shape)[:1]
        opened = self._render(question, True)
        thinks = opened.rstrip().endswith(_THINK)
        thought = f"{'' if thinks else _THINK}\n{_THOUGHT}\n{_THINK_END}\n\n" if shape.thought else ""
        calls, _ = self._before[shape]
        opened = opened.rstrip("\n") if thinks and thought else opened
        _, answer = self._stand_in(shape)
        if thinks and not shape.thought:
            answer["content"] = f"{_THINK}\n{_ANSWER}"  # a thought that the template opened and the model did not end
        whole = self._render([*question, answer, *given], True)
        if not whole.startswith(opened):
            return True
        # A space before the answer is the model's to sample.
        return whole[len(opened) :].lstrip() != (thought + _ANSWER + calls + text).lstrip()

    def _stand_in(self, shape: _Shape) -> list[dict[str, Any]]:
        answer = f"{_THINK}\n{_THOUGHT}\n{_THINK_END}\n\n{_ANSWER}" if shape.thought else _ANSWER
        turn: dict[str, Any] = {"role": "assistant", "content": answer}
        if shape.tools:
            turn["tool_calls"] = [
                {"id": f"call_{place}", "type": "function", "function": {"name": name, "arguments": {}}}
                for place, name in enumerate(shape.tools)
            ]
        return [{"role": "user", "content": "?"}, turn]

    def _stop_texts(self) -> Iterable[str]:
        return [text for token in self.stops if (text := self.tokenizer.decode([token], skip_special_tokens=False))]

    def _render(self, messages: list[dict[str, Any]], goes_on: bool, **more: Any) -> str:
        arguments = {**self.arguments, **more}
        template: Callable[..., str] = self.tokenizer.apply_chat_template
        try:
            return template(messages, tokenize=False, add_generation_prompt=goes_on, **arguments)
        except TypeError:
            # Some templates join the arguments of a call to text, others ask for a mapping.
            try:
                return template(_with_text(messages), tokenize=False, add_generation_prompt=goes_on, **arguments)
            except Exception as error:
                raise _refusal(messages, error) from error
        except Exception as error:
            raise _refusal(messages, error) from error

    def _ids(self, text: str) -> list[int]:
        return self._encode(text)


def _encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """Token ids of a text, as the tokenizer makes them.

    Where its class adds nothing to that of the tokenizers library, this is asked directly: the wrapper makes a batch,
    and batches go to other threads.
    """

    def wrapped(text: str) -> list[int]:
        return list(tokenizer([text], add_special_tokens=False)["input_ids"][0])

    if getattr(getattr(type(tokenizer), "_encode_plus", None), "__module__", "") != _WRAPPER:
        return wrapped
    wrapped("")  # switches off what the checkpoint's file says of truncation and padding
    backend = tokenizer.backend_tokenizer
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Text of token ids without special ones, as the tokenizer writes it.

    Where its class adds nothing to that of the tokenizers library, this is asked directly: the wrapper looks at every
    token's type.
    """
    adds_nothing = getattr(getattr(type(tokenizer), "_decode", None), "__module__", "") == _WRAPPER
    if not adds_nothing or tokenizer.clean_up_tokenization_spaces:
        return lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=True)
    return tokenizer.backend_tokenizer.decode


def _tool_names(messages: Iterable[Message]) -> Iterable[str]:
    return (str(m.get("name") or "tool") for m in messages if m["role"] == "tool")


def _with_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of tool calls as text."""

    def call(given: dict[str, Any]) -> dict[str, Any]:
        function = given["function"]
        return {**given, "function": {**function, "arguments": json.dumps(function["arguments"])}}

    return [{**m, "tool_calls": list(map(call, m["tool_calls"]))} if "tool_calls" in m else m for m in messages]


def _refusal(messages: Sequence[Message], error: Exception) -> BadInput:
    roles = ", ".join(str(message.get("role")) for message in messages)
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return BadInput(f"the chat template refuses a conversation of the roles {roles}: {line}")
