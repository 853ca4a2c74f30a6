"""Recipes from YAML: the shipped ones hold the seed document's values; paths are made absolute."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from vime.errors import BadInput
from vime.recipe import files
from vime.recipe.load import load_recipe, load_with_notes, uses_base_dir, with_absolute_paths


@pytest.mark.parametrize("name", files.names("recipes"))
def test_every_shipped_recipe_loads_and_needs_the_base_folder(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert uses_base_dir(recipe) == "--hf-checkpoint"


def test_deepseek_r1_holds_the_documents_values():
    recipe = load_recipe("deepseek-r1")
    perf, rollout, checkpoint = recipe.perf, recipe.rollout, recipe.checkpoint
    sizes = (perf.tensor_model_parallel_size, perf.pipeline_model_parallel_size, perf.context_parallel_size)
    assert (*sizes, perf.expert_model_parallel_size, perf.decoder_last_pipeline_num_layers) == (8, 4, 4, 32, 13)
    assert (rollout.num_rollout, rollout.rollout_batch_size, rollout.n_samples_per_prompt) == (3000, 128, 8)
    assert (rollout.over_sampling_batch_size, rollout.num_steps_per_rollout) == (256, 4)
    assert (rollout.rollout_max_response_len, rollout.rm_type) == (32768, "deepscaler")
    assert (recipe.engine.rollout_num_gpus_per_engine, recipe.engine.vllm["data_parallel_size"]) == (64, 8)
    assert (recipe.optimizer.lr, recipe.optimizer.adam_beta2) == (1e-6, 0.98)
    assert (checkpoint.convert_num_nodes, checkpoint.convert_ranks_per_node) == (4, 8)
    assert checkpoint.convert_decoder_first_pipeline_num_layers == 7
    assert checkpoint.convert_decoder_last_pipeline_num_layers == 6
    assert recipe.resources.colocate


def test_names_in_yaml_may_have_dashes_or_underscores(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("save-interval: 7\nsave_keep: 3\nvllm-max_num-seqs: 4\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.name, recipe.checkpoint.save_interval, recipe.checkpoint.save_keep) == ("mine", 7, 3)
    assert recipe.engine.vllm == {"max_num_seqs": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "unknown option --lrr: did you mean --lr?"),
        ("- lr", "holds a list"),
        ("lr: [", "is not YAML"),
        ("lr: {a: 1}", "--lr is {'a': 1}"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_recipe(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_is_answered_with_the_known_ones():
    with pytest.raises(
        BadInput, match="unknown recipe 'deepseek': give a path or one of deepseek-r1, deepseek-r1-agent"
    ):
        load_recipe("deepseek")


def test_a_persons_own_file_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "vime" / "recipes").mkdir(parents=True)
    (tmp_path / "vime" / "recipes" / "qwen3-4b.yaml").write_text("lr: 3\n")
    assert load_recipe("qwen3-4b").optimizer.lr == 3


def test_paths_are_absolute_with_the_base_folder_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    hostile = str(tmp_path / "a b'c$d ü")
    flags = ["--save", "here", "--load", "${BASE_DIR}/x", "--env", "CACHE=$BASE_DIR/c", "--save-hf", "$BASE_DIRECTORY"]
    recipe = with_absolute_paths(load_recipe("tiny-deepseek-r1", flags), hostile)
    assert recipe.checkpoint.hf_checkpoint == f"{hostile}/tiny-deepseek-r1"
    assert recipe.checkpoint.load == f"{hostile}/x"
    assert recipe.checkpoint.save == str(tmp_path / "here")
    assert recipe.checkpoint.save_hf == str(tmp_path / "$BASE_DIRECTORY")
    assert recipe.rollout.prompt_data == [f"{hostile}/tiny-math/train.jsonl"]
    assert recipe.eval.eval_prompt_data == ["tiny-math", f"{hostile}/tiny-math/eval.jsonl"]
    assert recipe.misc.env["CACHE"] == f"{hostile}/c"


def test_without_a_base_folder_its_name_stays():
    recipe = with_absolute_paths(load_recipe("tiny-deepseek-r1"), None)
    assert recipe.checkpoint.hf_checkpoint == "$BASE_DIR/tiny-deepseek-r1"


def test_evaluation_sets_are_pairs_of_name_and_path():
    with pytest.raises(BadInput, match="give a name and a path in turn"):
        with_absolute_paths(load_recipe("tiny-deepseek-r1", ["--eval-prompt-data", "aime"]), "/base")


@pytest.mark.parametrize(("family", "name"), [("deepseek-v3", "tiny-deepseek-r1"), ("qwen3", "tiny-qwen3")])
def test_the_tiny_models_are_those_that_the_tool_makes(family: str, name: str):
    pytest.importorskip("torch")
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_tiny_checkpoint.py"))
    made, shipped = tool["CONFIGS"][family], files.read(files.find("models", name))
    assert {key: made[key] for key in shipped} == shipped


def test_a_switch_for_what_vime_always_does_is_taken_with_a_note():
    loaded = load_with_notes("tiny-qwen3", ["--balance-data", "--lr", "2"])
    assert loaded.recipe == load_recipe("tiny-qwen3", ["--lr", "2"])
    assert loaded.notes == (
        "--balance-data changes nothing: the shares of the data-parallel ranks are always balanced by their cost",
    )
