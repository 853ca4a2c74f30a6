"""HF checkpoint folders of a few kilobytes with random weights, written with the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vime.fp8.quantise import is_quantised, quantise, scale_name
from vime.models.config import ModelConfig
from vime.models.families import params_of

DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "max_position_embeddings": 1280,
    "moe_intermediate_size": 40,
    "n_group": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
    },
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
    "vocab_size": 128,
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
LLAMA: dict[str, Any] = {
    **{key: value for key, value in QWEN3.items() if key != "head_dim"},
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}


def with_fp8(hf: dict[str, Any], block: tuple[int, int] = (16, 16)) -> dict[str, Any]:
    """The same model, stored in block fp8."""
    quantised = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return {**hf, "quantization_config": quantised}


def random_tensors(
    hf: dict[str, Any], *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint; norms near one, the router's bias in fp32, copies equal to what they copy."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for param in params_of(ModelConfig.from_hf(hf)):
        for part in param.parts:
            value = torch.randn(part.shape, generator=generator) * (0.1 if len(part.shape) == 1 else 0.2)
            if len(part.shape) == 1 and not param.fp32:
                value += 1
            value = value.to(torch.float32 if param.fp32 else dtype)
            tensors[part.name] = value
            tensors.update({alias: value.clone() for alias in part.aliases if alias != "lm_head.weight"})
    return tensors


def stored_tensors(hf: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as the checkpoint stores them: quantised with scales where `hf` says so."""
    config = ModelConfig.from_hf(hf)
    if config.quantisation is None:
        return tensors
    stored = dict(tensors)
    for part in (part for param in params_of(config) for part in param.parts):
        if is_quantised(part.name, part.quantised, config.quantisation):
            stored[part.name], stored[scale_name(part.name)] = quantise(tensors[part.name], config.quantisation.block)
    return stored


def write_folder(
    path: Path,
    hf: dict[str, Any],
    stored: dict[str, torch.Tensor],
    *,
    files: int = 1,
    extra: dict[str, str] | None = None,
) -> Path:
    """Writes config, small files and weights over `files` files (dealt out in turn, so a scale lies elsewhere)."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(hf))
    for name, text in {"tokenizer.json": "{}", **(extra or {})}.items():
        (path / name).write_text(text)
    if files == 1:
        save_file(stored, path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {tensor: names[i % files] for i, tensor in enumerate(stored)}
    for file in names:
        save_file({t: v for t, v in stored.items() if weight_map[t] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def write_checkpoint(path: Path, hf: dict[str, Any], *, files: int = 3, seed: int = 0, **options: Any) -> Path:
    """A complete random checkpoint of the model `hf` describes."""
    tensors = random_tensors(hf, seed=seed, **options)
    return write_folder(path, hf, stored_tensors(hf, tensors), files=files)
