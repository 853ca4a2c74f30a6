"""Command lines of neighbouring trainers: what is taken, what is refused, and the hint that comes with it."""

from __future__ import annotations

import pytest

from vime.errors import BadInput
from vime.recipe import tables
from vime.recipe.flags import recipe_options
from vime.recipe.load import load_recipe, load_with_notes
from vime.recipe.neighbours import ALWAYS_SO, NO_MATTER, NO_PLACE, RENAMED, plug_in


def test_no_entry_hides_an_option_and_every_other_name_exists():
    options = recipe_options()
    assert not (ALWAYS_SO.keys() | NO_MATTER | RENAMED.keys() | NO_PLACE.keys()) & options.keys()
    assert not RENAMED.keys() & NO_PLACE.keys()
    vllm = {f"vllm_{name}" for name in tables.VLLM_ARGS}
    assert set(RENAMED.values()) <= options.keys() | vllm


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("--learning-rate", "here it is --lr"),
        ("--group-rm", "--rm-type group:package.module:function"),
        ("--wandb-key", "set WANDB_API_KEY"),
        ("--node", "--nodes, before --"),
        ("--sglang-mem-fraction-static", "--vllm-gpu-memory-utilization"),
        ("--sglang-something-new", "vime generates with vLLM"),
        ("--critic-num-nodes", "not built"),
        ("--learning-rates", "did you mean --learning-rate? (here it is --lr)"),
        ("--rollout-bach-size", "did you mean --rollout-batch-size?"),
        ("--vllm-max-num-seq", "did you mean --vllm-max-num-seqs?"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_hint(given: str, hint: str):
    with pytest.raises(BadInput) as caught:
        load_recipe("tiny-qwen3", [given, "1"])
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_of_implementation_are_taken_and_named_in_one_note():
    flags = ["--no-masked-softmax-fusion", "--moe-token-drop-policy", "probs", "--lr", "3"]
    loaded = load_with_notes("tiny-qwen3", flags)
    assert loaded.recipe.optimizer.lr == 3
    (note,) = loaded.notes
    assert note.endswith("--no-masked-softmax-fusion, --moe-token-drop-policy")


def test_the_later_of_deepep_and_another_dispatcher_wins_with_a_note():
    model_args, misc_args = ["--moe-token-dispatcher-type", "alltoall"], ["--moe-enable-deepep"]
    off = load_with_notes("deepseek-r1", model_args)
    assert (off.recipe.misc.moe_enable_deepep, off.recipe.misc.moe_token_dispatcher_type) == (False, "alltoall")
    assert "DeepEP is off" in off.notes[0]
    on = load_with_notes("deepseek-r1", [*model_args, *misc_args])
    assert (on.recipe.misc.moe_enable_deepep, on.recipe.misc.moe_token_dispatcher_type) == (True, "flex")
    assert "the dispatcher is flex" in on.notes[0]
    assert not load_with_notes("deepseek-r1").notes


def test_a_dotted_path_of_a_plug_in_is_read():
    assert plug_in("my.rewards.score") == "my.rewards:score"
    assert plug_in("score") is None
    assert plug_in("my rewards.score") is None
