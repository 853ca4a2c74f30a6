"""Prompt sets: bad lines are named, long prompts counted, and a resumed run sees the very next ones."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import patience
from tests.support.stub_engine import CharacterTokenizer
from vime.data.rows import Columns
from vime.errors import BadInput, DataError
from vime.rollout.data import MOST_CHARACTERS, PromptSet, PromptStream, Tokenisation, load_prompts, load_tokenizer
from vime.samples import Prompt


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def load(path, columns=None, **how):
    return load_prompts(path, Tokenisation(CharacterTokenizer(), **how), columns=columns)


def test_text_and_chat_messages_are_read_with_label_and_metadata(tmp_path):
    chat = [{"role": "user", "content": "2+2="}]
    path = write(tmp_path / "a.jsonl", {"q": "1+1=", "a": 2}, "", {"q": chat, "a": "4", "m": {"source": "x"}})
    prompts = load(path, columns=Columns("q", "a", "m"), apply_chat_template=True).prompts
    assert [prompt.label for prompt in prompts] == [2, "4"]
    assert prompts[1].token_ids == [ord(c) for c in "2+2="]
    assert prompts[1].prompt == chat
    assert [prompt.metadata for prompt in prompts] == [{}, {"source": "x"}]


def test_parquet_is_read_like_jsonl(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    from pyarrow import parquet

    chat = [{"role": "user", "content": "2+2="}]
    table = pyarrow.table({"prompt": [chat, chat], "label": ["4", "4"], "metadata": [{"a": 1}, {"a": 2}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    prompts = load(tmp_path / "a.parquet", apply_chat_template=True).prompts
    assert [(p.prompt, p.label, p.metadata) for p in prompts] == [(chat, "4", {"a": 1}), (chat, "4", {"a": 2})]


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": "x" * n} for n in range(1, 11)))
    data = load(path, max_tokens=7)
    assert (len(data), data.too_long) == (7, 3)
    assert [prompt.number for prompt in data.prompts] == list(range(7))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (['{"prompt": "a"}', "{broken"], "line 2 is not JSON"),
        (["[1]"], "line 1 is a list"),
        (['{"text": "a"}'], "row 1 has no 'prompt' .it has text.: set --input-key"),
        (['{"prompt": 5}'], "'prompt' is a int"),
        (['{"prompt": [{"role": "user"}]}'], "role and content"),
        (['{"prompt": []}'], "role and content"),
        (['{"prompt": [{"role": "user", "content": "a"}]}'], "--apply-chat-template"),
        (['{"prompt": "a", "metadata": [1]}'], "'metadata' is a list"),
        ([], "it has no rows"),
    ],
)
def test_a_bad_line_is_named(tmp_path, rows, reason):
    with pytest.raises(BadInput, match=reason) as caught:
        load(write(tmp_path / "a.jsonl", *rows))
    assert "a.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_of_which_no_prompt_fits_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="all 1 prompts are longer than 2 tokens"):
        load(write(tmp_path / "long.jsonl", {"prompt": "abc"}), max_tokens=2)


def test_a_chat_that_the_template_refuses_is_named(tmp_path):
    class Refusing(CharacterTokenizer):
        def apply_chat_template(self, *_, **__):
            raise RuntimeError("roles must alternate")

    path = write(tmp_path / "a.jsonl", {"prompt": "a"})
    with pytest.raises(BadInput, match="row 1: the chat template refuses it: roles must alternate"):
        load_prompts(path, Tokenisation(Refusing(), apply_chat_template=True))


def test_a_template_that_never_ends_is_ended_and_named(tmp_path, monkeypatch):
    class Endless(CharacterTokenizer):
        def apply_chat_template(self, *_, **__):
            while True:
                pass

    monkeypatch.setattr("vime.rollout.data.MOST_TEMPLATE_SECONDS", 0.1)
    path = write(tmp_path / "a.jsonl", {"prompt": "a"})
    with pytest.raises(BadInput, match="row 1: the chat template takes longer"):
        load_prompts(path, Tokenisation(Endless(), apply_chat_template=True))


def test_arguments_reach_the_template(tmp_path):
    class Thinking(CharacterTokenizer):
        def apply_chat_template(self, chat, *, enable_thinking=True, **_):
            return chat[0]["content"] + ("+" if enable_thinking else "-")

    path = write(tmp_path / "a.jsonl", {"prompt": "a"})
    how = Tokenisation(Thinking(), True, {"enable_thinking": False})
    assert load_prompts(path, how).prompts[0].token_ids == [ord("a"), ord("-")]


def test_a_row_that_no_context_holds_is_too_long_without_being_tokenised(tmp_path):
    class Tokenises(CharacterTokenizer):
        def __call__(self, texts, **options):
            assert max(map(len, texts)) < MOST_CHARACTERS
            return super().__call__(texts, **options)

    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "a" * (MOST_CHARACTERS + 1)}, {"prompt": "b"})
    for template in (False, True):
        data = load_prompts(path, Tokenisation(Tokenises(), apply_chat_template=template))
        assert ([prompt.number for prompt in data.prompts], data.too_long) == ([0, 2], 1)


def test_the_number_of_a_prompt_is_its_row_across_batches(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": str(n)} for n in range(2500)))
    assert [(p.number, p.prompt) for p in load(path).prompts] == [(n, str(n)) for n in range(2500)]


@pytest.mark.e2e
def test_a_folder_without_a_tokenizer_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(BadInput, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="no tokenizer can be read"):
        load_tokenizer(tmp_path)


OWN_TOKENIZER = """
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    vocab_size = 100

    def get_vocab(self):
        return {"x" * number: number for number in range(1, 100)}

    def _tokenize(self, text):
        return text.split()

    def _convert_token_to_id(self, token):
        return len(token)
"""
LOAD_OWN = """
import sys
from vime.rollout.data import load_tokenizer
print(load_tokenizer(sys.argv[1], trust_remote_code=True)("one three", add_special_tokens=False)["input_ids"])
"""


@pytest.mark.e2e
def test_a_checkpoints_own_tokenizer_gives_its_own_ids_once_it_is_trusted(tmp_path):
    """Words are numbered by their length. In a process of its own, since transformers copies the code to its cache."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "tokenization_own.py").write_text(OWN_TOKENIZER)
    (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    named = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(BadInput, match="--trust-remote-code"):
        load_tokenizer(folder)
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", LOAD_OWN, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=patience.GROUP)
    assert done.stdout.strip() == "[3, 5]", done.stderr


def stream(rows, shuffle=True, seed=1):
    return PromptStream(PromptSet("set", tuple(Prompt(i, "", [1], None, {}) for i in range(rows))), shuffle, seed)


def numbers(prompts):
    return [prompt.number for prompt in prompts]


@given(st.integers(1, 30), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 40), st.booleans(), st.integers())
def test_a_resumed_stream_gives_the_very_next_prompts(rows, before, after, shuffle, seed):
    whole = stream(rows, shuffle, seed)
    for count in before:
        whole.take(count)
    resumed = stream(rows, shuffle, seed)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert numbers(resumed.take(after)) == numbers(whole.take(after))


@given(st.integers(1, 30), st.integers(1, 4), st.booleans(), st.integers())
def test_every_epoch_has_every_prompt_once(rows, epochs, shuffle, seed):
    taken = numbers(stream(rows, shuffle, seed).take(rows * epochs))
    for epoch in range(epochs):
        assert sorted(taken[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    first = stream(50)
    assert numbers(first.take(50)) != numbers(first.take(50))
    assert numbers(stream(50, seed=2).take(50)) != numbers(stream(50).take(50))
    assert numbers(stream(50, shuffle=False).take(50)) == list(range(50))


def test_a_cursor_of_another_prompt_set_is_refused():
    with pytest.raises(DataError, match="--prompt-data"):
        stream(5).load_state_dict(stream(6).state_dict())
    with pytest.raises(DataError, match="--rollout-seed"):
        stream(5).load_state_dict(stream(5, seed=9).state_dict())
