"""The model as `config.json` describes it, and the tables of its parameters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support import hf_configs as examples
from vime.errors import BadInput
from vime.models import config, llama, reading
from vime.models.config import ModelConfig
from vime.models.families import count, megatron_config, params_of, stage_of
from vime.models.namemap import Where
from vime.recipe.parallel import ParallelLayout


@pytest.mark.parametrize(
    ("hf", "decoder", "mtp"),
    [
        # Sizes of the published models; the MTP layer without its copies of embedding and head.
        (examples.DEEPSEEK_R1, 671_026_419_200, 11_610_068_224),
        (examples.MOONLIGHT, 15_960_110_208, 0),
        (examples.QWEN3_4B, 4_022_468_096, 0),
        (examples.QWEN3_30B_A3B, 30_532_122_624, 0),
        (examples.LLAMA_3_1_8B, 8_030_261_248, 0),
    ],
)
def test_parameters_add_up_to_the_published_size(hf, decoder, mtp):
    params = params_of(ModelConfig.from_hf(hf))
    assert count(p for p in params if p.where != Where.MTP) == decoder
    assert count(p for p in params if p.where == Where.MTP) == mtp


@pytest.mark.parametrize("hf", [examples.DEEPSEEK_R1, examples.QWEN3_4B, examples.QWEN3_30B_A3B])
def test_every_name_is_used_once(hf):
    params = params_of(ModelConfig.from_hf(hf))
    ours = [p.name for p in params]
    theirs = [name for p in params for part in p.parts for name in (part.name, *part.aliases)]
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)


def test_the_mtp_layer_shares_embedding_and_head():
    params = {p.name: p for p in params_of(ModelConfig.from_hf(examples.DEEPSEEK_R1))}
    assert params["embedding.word_embeddings.weight"].parts[0].aliases == ("model.layers.61.embed_tokens.weight",)
    assert params["output_layer.weight"].parts[0].aliases == ("model.layers.61.shared_head.head.weight",)
    assert params["mtp.layers.0.eh_proj.weight"].shape == (7168, 14336)


def test_both_spellings_of_rope_give_the_same_model():
    old = examples.DEEPSEEK_R1
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**examples.YARN, "rope_type": "yarn", "rope_theta": 10000.0}
    assert ModelConfig.from_hf(new) == ModelConfig.from_hf(old)


def test_deepseek_r1_in_megatrons_words():
    values = megatron_config(ModelConfig.from_hf(examples.DEEPSEEK_R1))
    expected = {
        "q_lora_rank": 1536,
        "qk_head_dim": 128,
        "rotary_base": 10000.0,
        "rotary_scaling_factor": 40.0,
        "moe_router_topk": 8,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
        "moe_shared_expert_intermediate_size": 2048,
        "moe_layer_freq": [0] * 3 + [1] * 58,
    }
    assert {key: values[key] for key in expected} == expected


def test_stages_follow_the_layout():
    model = ModelConfig.from_hf(examples.DEEPSEEK_R1)
    layout = ParallelLayout(world_size=128, tp=8, pp=4, cp=4, ep=32, last_stage_layers=13)
    of = {p.name: stage_of(p, layout, model.num_layers) for p in params_of(model) if p.expert is None}
    assert of["embedding.word_embeddings.weight"] == 0
    assert of["decoder.layers.15.input_layernorm.weight"] == 0
    assert of["decoder.layers.16.input_layernorm.weight"] == 1
    assert of["decoder.layers.48.input_layernorm.weight"] == 3
    assert of["mtp.layers.0.enorm.weight"] == of["output_layer.weight"] == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*DeepseekV3ForCausalLM.*Qwen3ForCausalLM"),
        ({"architectures": None}, r"\(none\)"),
        ({"hidden_size": None}, "hidden_size"),
        ({"attention_bias": True}, "attention_bias"),
        ({"scoring_func": "softmax"}, "softmax"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_what_vime_cannot_train_is_named(change, told):
    with pytest.raises(BadInput, match=told):
        ModelConfig.from_hf({**examples.DEEPSEEK_R1, **change})


class Toy:
    """A family as somebody else would write it: llama's shape under a name and with a switch of its own."""

    ARCHITECTURES = ("ToyForCausalLM",)
    params = staticmethod(llama.params)
    megatron_config = staticmethod(llama.megatron_config)
    gpt_arguments = staticmethod(llama.gpt_arguments)

    @staticmethod
    def read(hf: Mapping[str, Any]) -> ModelConfig:
        return reading.grouped(hf, qk_layernorm=bool(hf.get("toy_norm")))


def test_a_family_can_be_added_from_outside(monkeypatch):
    monkeypatch.setattr(config, "_FAMILIES", dict(config._FAMILIES))
    config.register(Toy())
    hf = {**examples.LLAMA_3_1_8B, "architectures": ["ToyForCausalLM"]}
    plain, normed = ModelConfig.from_hf(hf), ModelConfig.from_hf({**hf, "toy_norm": True})
    assert count(params_of(plain)) == 8_030_261_248
    assert count(params_of(normed)) - count(params_of(plain)) == 2 * normed.head_dim * normed.num_layers
    assert megatron_config(normed)["qk_layernorm"] is True
    with pytest.raises(ValueError, match="ToyForCausalLM belongs to another family"):
        config.register(Toy())


def test_an_architecture_is_named_by_its_family_alone():
    folder = Path(config.__file__).parent
    naming = {path.name for path in folder.parent.rglob("*.py") if "ForCausalLM" in path.read_text()}
    assert naming == {"deepseek_v3.py", "qwen3.py", "llama.py"}


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="not JSON"):
        ModelConfig.from_folder(tmp_path)


def test_the_tables_need_no_torch():
    code = (
        "import sys, vime.models.families; sys.exit(sum(m in sys.modules for m in ('torch', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
