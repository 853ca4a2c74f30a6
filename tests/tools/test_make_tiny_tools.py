"""The checkpoint that can call tools: what it is trained on is what a run shows it and reads from it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import make_tiny_tools as made  # noqa: E402  # pyright: ignore[reportMissingImports]

from vime.agents.sandbox import Limits  # noqa: E402
from vime.agents.tools import make_tools  # noqa: E402
from vime.rollout.chat import ChatTemplate  # noqa: E402

PRODUCT = made.Product(67, 8)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    made.save_tokenizer(folder)
    return ChatTemplate(AutoTokenizer.from_pretrained(folder))


def test_the_tokenizer_fits_the_models_vocabulary(chat: ChatTemplate) -> None:
    assert len(chat.tokenizer) == made.VOCABULARY == made.CONFIG["vocab_size"]


@pytest.mark.parametrize("tool", made.TOOLS, ids=lambda tool: tool.name)
async def test_a_run_with_either_tool_shows_the_model_the_tokens_that_it_was_trained_on(
    chat: ChatTemplate, tool: made.Tool
) -> None:
    (prompt, _), (call, _), (told, _), (said, _) = PRODUCT.parts(tool, True)
    built_in = make_tools([tool.name], Limits(seconds=60.0))[tool.name]
    assert chat.prompt(PRODUCT.record()["prompt"], [built_in.schema]) == prompt

    text = chat.tokenizer.decode(call)
    assert chat.tokenizer.encode(text) == call
    assert text.startswith("<tool_call>")
    asked = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call><|end|>"))
    assert asked["name"] == tool.name
    answer = await built_in.call(**asked["arguments"])
    suffix = chat.suffix([{"role": "tool", "content": answer, "name": tool.name}], last_id=made.END)
    assert suffix.token_ids == told
    assert chat.tokenizer.decode(said, skip_special_tokens=True) == PRODUCT.answer == PRODUCT.record()["label"]
