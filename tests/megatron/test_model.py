"""Megatron's models compute what transformers' models compute, also on packed sequences."""

from __future__ import annotations

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from tests.support import tiny_hf
from tests.support.single import MODELS, built, one_process
from vime.errors import BadInput
from vime.megatron import backend
from vime.megatron.model import BuildOptions, build_model, megatron_config
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.local import local_tensors
from vime.recipe.load import load_recipe
from vime.recipe.parallel import ParallelLayout


def transformers_logits(hf: dict, tokens: torch.Tensor) -> torch.Tensor:
    import transformers

    architecture = hf["architectures"][0]
    config_class = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    values = {key: value for key, value in hf.items() if key != "architectures"}
    values["num_nextn_predict_layers"] = 0
    config = config_class(**values, attn_implementation="eager")
    with torch.device("cpu"):
        model = getattr(transformers, architecture)(config).float().eval()
    tensors = tiny_hf.random_tensors(hf, dtype=torch.float32)
    state = {}
    for name in model.state_dict():
        if name in tensors:
            state[name] = tensors[name]
        elif name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            count = hf.get("n_routed_experts") or hf["num_experts"]
            parts = [
                torch.cat([tensors[f"{prefix}{e}.{part}_proj.weight"] for part in ("gate", "up")]) for e in range(count)
            ]
            state[name] = torch.stack(parts)
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            count = hf.get("n_routed_experts") or hf["num_experts"]
            state[name] = torch.stack([tensors[f"{prefix}{e}.down_proj.weight"] for e in range(count)])
        elif name == "lm_head.weight" and hf.get("tie_word_embeddings"):
            state[name] = tensors["model.embed_tokens.weight"]
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert not [key for key in missing.missing_keys if "inv_freq" not in key]
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name: str) -> None:
    hf = MODELS[name]
    lengths = [40, 17, 64]
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(0, hf["vocab_size"], (length,), generator=generator) for length in lengths]
    with one_process() as layout, torch.no_grad():
        (model,) = built(hf, layout)
        model.eval()
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        packed = PackedSeqParams("thd", bounds, bounds, bounds, bounds, max(lengths), max(lengths))
        ours = model(torch.cat(sequences)[None], None, None, packed_seq_params=packed)[0]
        alone = model(sequences[0][None], None, None)[0]
    theirs = [transformers_logits(hf, sequence[None])[0] for sequence in sequences]
    assert (ours - torch.cat(theirs)).abs().max() < 1e-4
    assert (alone - theirs[0]).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_the_name_map_is_in_the_model(name: str) -> None:
    hf = MODELS[name]
    config = ModelConfig.from_hf(hf)
    with one_process() as layout:
        chunks = build_model(config, layout, bf16=True, mtp=True)
        found = local_tensors(chunks, config, layout, layout.coordinates(0))
    assert {local.param.name for local in found} == {param.name for param in params_of(config)}
    for local in found:
        assert local.tensor.dtype == (torch.float32 if local.param.fp32 else torch.bfloat16)


def test_without_mtp_only_its_layers_are_left_out() -> None:
    config = ModelConfig.from_hf(MODELS["deepseek"])
    with one_process() as layout:
        chunks = build_model(config, layout, bf16=False)
        found = {local.param.name for local in local_tensors(chunks, config, layout, layout.coordinates(0))}
    assert {param.name for param in params_of(config)} - found == {
        param.name for param in params_of(config) if param.name.startswith("mtp.")
    }


@pytest.mark.parametrize(
    ("name", "layout", "what"),
    [
        ("deepseek", ParallelLayout(world_size=2, tp=2), "sequence-parallel"),
        ("deepseek", ParallelLayout(world_size=3, tp=3, sequence_parallel=True), "attention heads"),
        ("deepseek", ParallelLayout(world_size=3, ep=3), "experts"),
        ("qwen3", ParallelLayout(world_size=2, ep=2), "no experts"),
        ("qwen3_moe", ParallelLayout(world_size=2, tp=2), "mixtures of experts under tensor parallelism"),
        ("qwen3", ParallelLayout(world_size=5, pp=5), "do not divide over 5 pipeline stages"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(name: str, layout: ParallelLayout, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        build_model(ModelConfig.from_hf(MODELS[name]), layout, bf16=False)


def test_a_vocabulary_that_tensor_parallelism_would_fill_up_is_refused() -> None:
    config = ModelConfig.from_hf({**MODELS["qwen3"], "vocab_size": 129})
    with pytest.raises(BadInput, match="the vocabulary of 129 does not divide by --tensor-model-parallel-size 2"):
        build_model(config, ParallelLayout(world_size=2, tp=2), bf16=False)


def test_a_dispatcher_that_cannot_take_packed_micro_batches_through_a_pipeline_is_refused() -> None:
    options = BuildOptions(moe_token_dispatcher_type="allgather")
    layout = ParallelLayout(world_size=2, pp=2)
    with pytest.raises(BadInput, match=r"allgather cannot take packed micro-batches .* through PP2: use alltoall"):
        megatron_config(ModelConfig.from_hf(MODELS["deepseek"]), layout, bf16=True, mtp=False, options=options)


def test_every_option_of_the_full_recipe_reaches_megatron_on_a_gpu_and_is_spoken_of_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = BuildOptions.from_recipe(load_recipe("deepseek-r1", []))
    config, layout = ModelConfig.from_hf(MODELS["deepseek"]), ParallelLayout()
    said = " ".join(options.without_effect(cpu=True))
    assert "--moe-enable-deepep" in said
    assert "--attention-backend flash" in said
    assert options.without_effect(cpu=False) == []
    here = megatron_config(config, layout, bf16=True, mtp=False, options=options)
    assert here.moe_token_dispatcher_type == "alltoall"
    assert (here.recompute_granularity, here.recompute_method, here.recompute_num_layers) == ("full", "uniform", 1)
    gpu = backend.Backend(torch.device("cuda", 0), "nccl", transformer_engine=False)
    monkeypatch.setattr(backend, "setup", lambda: gpu)
    there = megatron_config(config, layout, bf16=True, mtp=False, options=options)
    assert (there.moe_token_dispatcher_type, there.moe_flex_dispatcher_backend) == ("flex", "deepep")
    assert (there.attention_backend.name, there.attention_softmax_in_fp32) == ("flash", True)
