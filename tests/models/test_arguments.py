"""Model flags given by hand must describe the checkpoint's model."""

from __future__ import annotations

import shlex

import pytest

from tests.support import hf_configs
from vime import plan
from vime.errors import BadInput
from vime.models.arguments import check_model_args, expected_args, read_layer_frequency, shell_arguments
from vime.models.config import ModelConfig
from vime.recipe import files
from vime.recipe.flags import parse_flags
from vime.recipe.tables import MEGATRON_MODEL_FLAGS

R1 = ModelConfig.from_hf(hf_configs.DEEPSEEK_R1)
R1_FLAGS = {
    "num_layers": 61,
    "hidden_size": 7168,
    "ffn_hidden_size": 18432,
    "num_attention_heads": 128,
    "kv_channels": 128,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "position_embedding_type": "rope",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": 129280,
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "qk_layernorm": True,
    "rotary_base": "10000",
    "rotary_scaling_factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "no_rope_fusion": True,
    "num_experts": 256,
    "moe_layer_freq": "([0]*3+[1]*58)",
    "moe_ffn_hidden_size": 2048,
    "moe_router_topk": 8,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_router_pre_softmax": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0,
    "moe_router_bias_update_rate": 0,
    "moe_router_num_groups": 8,
    "moe_router_group_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_dtype": "fp32",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
}


def test_the_flags_of_deepseek_r1_fit_its_config():
    assert set(R1_FLAGS) <= set(MEGATRON_MODEL_FLAGS)
    check_model_args(R1, R1_FLAGS)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("rotary_base", 1000000, "--rotary-base is 1000000, but config.json implies 10000"),
        ("num_layers", 60, "--num-layers is 60, but config.json implies 61"),
        ("moe_layer_freq", "[0]*2+[1]*59", "--moe-layer-freq is"),
        ("num_query_groups", 8, "--num-query-groups"),
        ("squared_relu", True, "--squared-relu .*leave it out"),
        ("moe_router_score_function", "softmax", "sigmoid"),
    ],
)
def test_a_flag_of_another_model_is_named(name, value, told):
    with pytest.raises(BadInput, match=told):
        check_model_args(R1, {name: value})


@pytest.mark.parametrize(
    "hf", [hf_configs.DEEPSEEK_R1, hf_configs.QWEN3_4B, hf_configs.QWEN3_30B_A3B, hf_configs.LLAMA_3_1_8B]
)
def test_a_model_fits_its_own_flags(hf):
    config = ModelConfig.from_hf(hf)
    flags = {name: value for name, value in expected_args(config).items() if name in MEGATRON_MODEL_FLAGS}
    check_model_args(config, flags)


def test_layer_frequency_is_an_expression_of_lists_only():
    assert read_layer_frequency("([0]*1+[1]*3)", 4) == [0, 1, 1, 1]
    assert read_layer_frequency(2, 4) == [1, 0, 1, 0]
    with pytest.raises(BadInput, match="moe-layer-freq"):
        read_layer_frequency("__import__('os').getcwd()", 4)


@pytest.mark.parametrize("name", files.names("models"))
def test_the_printed_arguments_of_a_model_describe_it(name):
    config = ModelConfig.from_hf(files.read(files.find("models", name)))
    check_model_args(config, dict(parse_flags(shell_arguments(config))))


def test_the_printed_arguments_are_one_shell_line(capsys):
    assert plan.main(["--print-model-args", "deepseek-v3"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[words.index("--moe-layer-freq") + 1] == "[0]*3+[1]*58"
    assert "--multi-latent-attention" in words
