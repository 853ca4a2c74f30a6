"""Flags as the seed document spells them, to typed values; and what is refused, with which words."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vime.errors import BadInput
from vime.recipe import tables
from vime.recipe.flags import flag, parse_flags, recipe_options
from vime.recipe.load import load_recipe
from vime.recipe.schema import Recipe, help_texts

SEED_FLAGS = """
--hf-checkpoint /data/DeepSeek-R1/ --ref-load /data/DeepSeek-R1_torch_dist/ --load /data/r1/ --save /data/r1/
--save-interval 20 --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4
--context-parallel-size 4 --expert-model-parallel-size 32 --expert-tensor-parallel-size 1
--decoder-last-pipeline-num-layers 13 --recompute-granularity full --recompute-method uniform
--recompute-num-layers 1 --use-dynamic-batch-size --max-tokens-per-gpu 16384
--advantage-estimator grpo --use-kl-loss --kl-loss-coef 0.00 --kl-loss-type low_var_kl --entropy-coef 0.00
--eps-clip 0.2 --eps-clip-high 0.28 --optimizer-cpu-offload --overlap-cpu-optimizer-d2h-h2d
--use-precision-aware-optimizer --rollout-num-gpus-per-engine 64 --vllm-gpu-memory-utilization 0.7
--vllm-enable-expert-parallel --vllm-data-parallel-size 8 --vllm-server-concurrency 1024
--vllm-speculative-config '{"method":"eagle","num_speculative_tokens":4}'
--moe-enable-deepep --moe-token-dispatcher-type flex
"""


def values(*flags: str) -> dict[str, object]:
    return dict(parse_flags(flags))


def test_every_flag_group_of_the_seed_document_is_accepted_as_written():
    recipe = load_recipe("tiny-qwen3", shlex.split(SEED_FLAGS))
    assert recipe.perf.tensor_model_parallel_size == 8
    assert recipe.perf.decoder_last_pipeline_num_layers == 13
    assert recipe.checkpoint.save_interval == 20
    assert recipe.algorithm.eps_clip_high == 0.28
    assert recipe.optimizer.optimizer_cpu_offload
    assert recipe.engine.vllm_server_concurrency == 1024
    assert recipe.engine.vllm["data_parallel_size"] == 8
    assert recipe.engine.vllm["gpu_memory_utilization"] == 0.7
    assert recipe.engine.vllm["enable_expert_parallel"] is True
    assert recipe.engine.vllm["speculative_config"] == {"method": "eagle", "num_speculative_tokens": 4}


def test_switches_are_given_bare_negated_or_with_a_word():
    assert values("--colocate") == {"colocate": True}
    assert values("--no-colocate") == {"colocate": False}
    assert values("--colocate=false") == {"colocate": False}
    assert values("--no-vllm-enforce-eager", "--vllm-no-enable-prefix-caching") == {
        "vllm_enforce_eager": False,
        "vllm_enable_prefix_caching": False,
    }


def test_lists_take_the_words_up_to_the_next_flag_or_one_json_list():
    assert values("--rollout-stop", "a b", "c", "--lr", "1")["rollout_stop"] == ["a b", "c"]
    assert values("--eval-prompt-data", '["aime", "/x"]')["eval_prompt_data"] == ["aime", "/x"]


def test_a_value_may_be_negative_stand_after_an_equals_sign_or_hold_one():
    assert values("--rollout-top-k", "-1") == {"rollout_top_k": "-1"}
    assert values("--lr=2e-6", "--env", "A=b=c") == {"lr": "2e-6", "env": {"A": "b=c"}}


def test_the_later_of_two_wins_and_mappings_are_merged():
    recipe = load_recipe("tiny-qwen3", ["--lr", "1", "--lr", "2", "--env", "A=1", "--vllm-max-num-seqs", "5"])
    assert recipe.optimizer.lr == 2
    assert recipe.misc.env["A"] == "1"
    assert "VLLM_CPU_KVCACHE_SPACE" in recipe.misc.env
    assert recipe.engine.vllm["max_num_seqs"] == 5
    assert recipe.engine.vllm["enforce_eager"] is True


def test_megatron_model_flags_are_kept_apart_for_the_comparison_with_the_checkpoint():
    recipe = load_recipe("tiny-qwen3", ["--num-layers", "3", "--rotary-base", "10000", "--swiglu", "--no-rope-fusion"])
    expected = {"num_layers": 3, "rotary_base": 10000, "swiglu": True, "no_rope_fusion": True}
    assert recipe.model.model_args == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout-bach-size", "3"], "did you mean --rollout-batch-size?"),
        (["--vllm-max-num-seq", "3"], "did you mean --vllm-max-num-seqs?"),
        (["--tensor-parallel-size", "3"], "unknown option --tensor-parallel-size"),
        (["--train-iters", "3"], "--train-iters is a flag of Megatron that vime does not use"),
        (["--fp16"], "--fp16 is a flag of Megatron that vime does not use"),
        (["--vllm-port", "80"], "--vllm-port cannot be given: the plan decides the ports"),
        (["--vllm-tensor-parallel-size", "8"], "it is --rollout-num-gpus-per-engine divided by"),
        (["--vllm-data-parallel-rank", "1"], "the plan decides where each rank sits"),
        (["--vllm-api-key", "x"], "the run makes a key of its own"),
        (["--lr"], "--lr takes one value, given none"),
        (["--lr", "1", "2"], "--lr takes one value, given 1 2"),
        (["--lr", "fast"], "--lr is 'fast'"),
        (["--colocate", "5"], "--colocate is a switch and takes no value"),
        (["--kl-loss-type", "k9"], "input should be 'k1', 'k2', 'k3' or 'low_var_kl'"),
        (["--env", "A"], "--env takes KEY=VALUE"),
        (["lr", "3"], "unexpected argument 'lr'"),
        (["--eval-prompt-data", "aime"], None),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_that_names_it(flags: list[str], message: str | None):
    if message is None:
        assert load_recipe("tiny-qwen3", flags).eval.eval_prompt_data == ["aime"]
        return
    with pytest.raises(BadInput) as caught:
        load_recipe("tiny-qwen3", flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.sampled_from(sorted(name for name, to in recipe_options().items() if to.kind == "value"))))
def test_values_come_back_under_their_names(names: list[str]):
    words = [word for name in names for word in (flag(name), "7")]
    assert list(parse_flags(words)) == [(name, "7") for name in names]


def test_no_option_of_vime_hides_one_of_vllm_or_megatron():
    vllm = {f"vllm_{name}" for name in (*tables.VLLM_ARGS, *tables.VLLM_OWNED)}
    assert not vllm & set(recipe_options())
    assert not set(tables.MEGATRON_MODEL_FLAGS) & set(tables.MEGATRON_FLAGS)
    assert not set(tables.MEGATRON_MODEL_FLAGS) & set(recipe_options())


def test_every_option_has_a_help_text():
    fields = {name: type(getattr(Recipe(name="x"), target.group)) for name, target in recipe_options().items()}
    assert not [name for name, group in fields.items() if name not in help_texts(group)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollout-top-p", "0"], "--rollout-top-p is '0': input should be greater than 0"),
        (["--eval-top-p", "1.5"], "--eval-top-p is '1.5': input should be less than or equal to 1"),
        (["--n-samples-per-prompt", "0"], "--n-samples-per-prompt is '0': input should be greater than or equal to 1"),
        (["--lr", "nan"], "--lr is 'nan': input should be a finite number"),
        (["--max-staleness", "-1"], "--max-staleness is '-1'"),
        (["--eps-clip-c", "1"], "--eps-clip-c is '1': input should be greater than 1"),
    ],
)
def test_a_value_out_of_its_bounds_is_refused(flags: list[str], message: str):
    with pytest.raises(BadInput, match=re.escape(message)):
        load_recipe("tiny-qwen3", flags)
