"""The dry run's look at the data: every fault of a kind is found before the queue, quickly and without torch."""

import json
import subprocess
import sys
import time

import pytest

from vime.data import check
from vime.data.check import check_prompt_data
from vime.errors import BadInput
from vime.recipe.load import load_recipe
from vime.recipe.prompt_sources import PromptSource, evaluation_sources, training_sources, with_paths


def recipe_of(*flags):
    return load_recipe("tiny-qwen3", ["--rm-type", "math", *map(str, flags)])


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


GOOD = [{"prompt": f"{n}+1=", "label": str(n + 1)} for n in range(40)]


def test_good_sets_give_no_notes(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert check_prompt_data(recipe_of("--prompt-data", path, "--eval-prompt-data", "a", path)) == []


@pytest.mark.parametrize("place", [0, 5, check.STRIDE, check.STRIDE + 11])
def test_the_first_some_later_and_the_last_row_are_looked_at(tmp_path, place):
    rows = [*(GOOD * 50)[:place], {"question": "?"}]
    with pytest.raises(BadInput, match=rf"--prompt-data: .*a.jsonl row {place + 1} has no 'prompt'"):
        check_prompt_data(recipe_of("--prompt-data", write(tmp_path / "a.jsonl", rows), "--eval-prompt-data", "[]"))


def test_evaluation_sets_are_looked_at_too(tmp_path):
    good, bad = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", [{"prompt": "a"}])
    with pytest.raises(BadInput, match=r"--eval-prompt-data: .*b.jsonl row 1: has no 'label'"):
        check_prompt_data(recipe_of("--prompt-data", good, "--eval-prompt-data", "b", bad))


def test_a_missing_set_is_refused_only_where_sets_are_required(tmp_path):
    recipe = recipe_of("--prompt-data", tmp_path / "none.jsonl", "--eval-prompt-data", "[]")
    assert check_prompt_data(recipe, required=False) == []
    with pytest.raises(BadInput, match=r"--prompt-data: there is no file .*none.jsonl"):
        check_prompt_data(recipe)


def test_a_large_file_costs_no_time(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD * 10000)
    assert path.stat().st_size > check.MOST_BYTES
    started = time.process_time()
    check_prompt_data(recipe_of("--prompt-data", path, "--eval-prompt-data", "[]"))
    assert time.process_time() - started < 0.2


def test_an_array_is_noted_and_an_empty_file_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    recipe = recipe_of("--prompt-data", tmp_path / "a.json", "--eval-prompt-data", "[]")
    assert ["a.json is one JSON array" in note for note in check_prompt_data(recipe)] == [True]
    (tmp_path / "a.json").write_text("")
    with pytest.raises(BadInput, match="it has no rows"):
        check_prompt_data(recipe)


def test_the_look_needs_neither_torch_nor_ray_nor_vllm_nor_aiohttp():
    code = (
        "import sys, vime.data.check; print(sorted({'torch', 'ray', 'vllm', 'aiohttp', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_several_training_sets_have_names_and_weights():
    assert training_sources(["/a/b.jsonl"]) == (PromptSource("b", "/a/b.jsonl"),)
    assert training_sources(["math=/a:3", "code=/b"]) == (PromptSource("math", "/a", 3.0), PromptSource("code", "/b"))
    assert with_paths(["math=a:3", "code=b"], lambda path: "/x/" + path) == ["math=/x/a:3", "code=/x/b:1"]
    assert with_paths(["a=b.jsonl"], lambda path: "/x:5/" + path) == ["a=/x:5/b.jsonl:1"]
    assert training_sources(["a=/x:5/b.jsonl:1"]) == (PromptSource("a", "/x:5/b.jsonl"),)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (["/a", "/b"], "several sets are written name=path"),
        (["a=/a", "a=/b"], "same name"),
        (["a=/a:0", "b=/b"], "above 0"),
        (["a=/a:1.2.3", "b=/b"], "above 0"),
    ],
)
def test_sets_that_make_no_mixture_are_refused(values, reason):
    with pytest.raises(BadInput, match=reason):
        training_sources(values)


def test_evaluation_sets_are_names_and_paths_in_turn():
    assert [(each.name, each.path) for each in evaluation_sources(["a", "/a", "b", "/b"])] == [("a", "/a"), ("b", "/b")]
    with pytest.raises(BadInput, match="in turn"):
        evaluation_sources(["a"])
