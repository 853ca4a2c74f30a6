"""The recipes of agents: what their templates tell the model, and that vLLM's parsers read it back."""

import json
import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.plans import plan_of
from vime.agents.sandbox import Limits
from vime.agents.tools import make_tools
from vime.rollout.chat import ChatTemplate

BOS, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MARKS = [
    *(BOS, END, "<｜User｜>", "<｜Assistant｜>"),
    *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")),
    *(f"<｜tool▁{name}｜>" for name in ("outputs▁begin", "output▁begin", "output▁end", "outputs▁end")),
]
PARSED = re.compile(
    r"<｜tool▁call▁begin｜>(?P<type>.*)<｜tool▁sep｜>(?P<name>.*)\n```json\n(?P<arguments>.*)\n```<｜tool▁call▁end｜>"
)
"""How vLLM's parser `deepseek_v3` finds a call."""


@pytest.fixture
def chat():
    words = [*MARKS, *(chr(code) for code in range(1, 256)), "<unk>"]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=END, unk_token="<unk>", additional_special_tokens=MARKS[2:]
    )
    recipe = plan_of("deepseek-r1-agent", nodes=16, cluster="example").recipe
    return ChatTemplate(fast, recipe.rollout.apply_chat_template_kwargs)


def test_r1s_prompt_tells_of_the_tools_and_opens_a_thought(chat):
    tools = [make_tools(["python"], Limits())["python"].schema]
    text = chat.tokenizer.decode(chat.prompt([{"role": "user", "content": "2+2?"}], tools))
    assert text.startswith(f"{BOS}You may call tools.")
    assert json.dumps(tools[0]["function"]) in text
    assert text.endswith("<｜User｜>2+2?<｜Assistant｜><think>\n")
    plain = chat.tokenizer.decode(chat.prompt([{"role": "user", "content": "2+2?"}]))
    assert plain == f"{BOS}<｜User｜>2+2?<｜Assistant｜><think>\n"


def test_r1s_history_of_calls_is_what_vllms_parser_reads(chat):
    call = {"type": "function", "function": {"name": "python", "arguments": {"code": "print(2)\n"}}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "so", "tool_calls": [call]}]
    found = PARSED.search(chat.tokenizer.decode(chat.prompt(messages)))
    assert found
    assert (found["type"], found["name"]) == ("function", "python")
    assert json.loads(found["arguments"]) == {"code": "print(2)\n"}


@pytest.mark.parametrize("thought", [False, True])
def test_r1s_tools_answer_without_a_new_mark_and_nothing_diverges(chat, thought):
    end = chat.tokenizer.eos_token_id
    answers = [{"role": "tool", "content": "2", "name": "python"}, {"role": "tool", "content": "3", "name": "python"}]
    suffix = chat.suffix(answers, last_id=end, thought=thought)
    outputs = "".join(f"<｜tool▁output▁begin｜>{text}<｜tool▁output▁end｜>" for text in "23")
    assert chat.tokenizer.decode(suffix.token_ids) == f"<｜tool▁outputs▁begin｜>{outputs}<｜tool▁outputs▁end｜>"
    assert not suffix.diverges
    asked = chat.suffix([{"role": "user", "content": "sure?"}], last_id=end, thought=thought)
    assert chat.tokenizer.decode(asked.token_ids) == "<｜User｜>sure?<｜Assistant｜><think>\n"
    assert not asked.diverges


def test_the_tiny_recipe_is_the_large_one_in_small():
    tiny, large = (
        plan_of("tiny-tools", nodes=1).recipe,
        plan_of("deepseek-r1-agent", nodes=16, cluster="example").recipe,
    )
    for recipe in (tiny, large):
        assert recipe.agent.environment == "tools"
        assert recipe.engine.vllm["tool_call_parser"]
    assert tiny.agent.tools == ["calculator"]
    assert large.agent.tools == ["python"]
