"""Chat templates of the kinds that models ship, each with a real tokenizer of characters and special tokens.

They are written for the tests: what counts is how each kind treats tool messages, thoughts and the end of a turn.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|start|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|outputs|>", "<|unk|>")
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}

MARKED = (
    "{% if tools %}<|start|>system\nTools: {{ tools | tojson }}<|end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|end|>\n{% endif %}"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Turns between markers; tool messages that follow one another share a turn of the user."""

FORGETS_THOUGHTS = MARKED.replace(
    "{{ m.content }}{% for",
    "{% if '</think>' in m.content and not loop.last and (messages[loop.index0 + 1:] | map(attribute='role') | list)"
    " != ['tool'] * (messages | length - loop.index) %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{% for",
)
"""As MARKED, but a thought is left out once anything but a tool's answer follows."""

OUTPUTS = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments + '' }}]{% endfor %}<|end|>"
    "{% endif %}"
    "{% if m.role == 'tool' %}<|outputs|>{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|assistant|><think>\n{% endif %}"
)
"""Opens a thought itself and drops it later; goes on behind a tool's answer without a mark; arguments are text."""

ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<|end|>{% endif %}{% endfor %}"
)
"""No tools, no mark of generation, and roles in turn."""

NO_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A text without any special token."""

TEMPLATES = {
    "marked": MARKED,
    "forgets thoughts": FORGETS_THOUGHTS,
    "outputs": OUTPUTS,
    "alternates": ALTERNATES,
    "no end": NO_END,
}


@cache
def _tokenizer() -> Tokenizer:
    characters = [chr(code) for code in (*range(32, 127), 10)]
    words = [*SPECIAL, *characters]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def tokenizer_of(template: str) -> Any:
    """A tokenizer with the template; its end of text is `<|end|>`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(),
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=[*SPECIAL[1:-1]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast
