"""Checkpoints of the tiny recipes' shapes with random weights, and a rank's shards of them in any layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vime.fp8 import quantise as fp8
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Where
from vime.models.shards import holds
from vime.models.transform import join, shard
from vime.recipe.parallel import ParallelLayout

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
import make_tiny_checkpoint as tiny  # noqa: E402  # pyright: ignore[reportMissingImports]

DEEPSEEK: dict[str, Any] = tiny.CONFIGS["deepseek-v3"]
QWEN3: dict[str, Any] = tiny.CONFIGS["qwen3"]

Tensors = dict[str, torch.Tensor]


def trained(hf: dict[str, Any], seed: int) -> Tensors:
    """fp32 weights by HF name, large enough that every layer matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for param in params_of(ModelConfig.from_hf(hf)):
        for part in param.parts:
            value = torch.randn(part.shape, generator=generator) * 0.1
            tensors[part.name] = value + 1 if part.name.endswith("norm.weight") else value
    return tensors


def as_streamed(hf: dict[str, Any], tensors: Tensors, *, in_fp8: bool = False) -> Tensors:
    """Tensors that an engine gets, with copies. If it holds bf16: the numbers of fp8 where the checkpoint is quantised;
    `in_fp8`: e4m3 and scales there."""
    config = ModelConfig.from_hf(hf)
    result: Tensors = {}
    for param in params_of(config):
        for part in param.parts:
            value = tensors[part.name]
            if fp8.is_quantised(part.name, part.quantised, config.quantisation):
                assert config.quantisation is not None
                codes, scales = fp8.quantise(value, config.quantisation.block)
                if in_fp8:
                    result |= {part.name: codes, fp8.scale_name(part.name): scales}
                    continue
                value = fp8.dequantise(codes, scales, config.quantisation.block)
            result[part.name] = value.to(torch.float32 if param.fp32 else torch.bfloat16)
            for alias in part.aliases if not config.tie_word_embeddings else ():
                result[alias] = result[part.name].clone()
    return result


def write_folder(path: Path, hf: dict[str, Any], tensors: Tensors, *, in_fp8: bool = False) -> Path:
    """A folder that vLLM loads, in bf16 or quantised as the model's configuration says."""
    path.mkdir()
    tiny.save_tokenizer(path)
    config = {key: value for key, value in hf.items() if in_fp8 or key != "quantization_config"}
    (path / "config.json").write_text(json.dumps(config))
    save_file(as_streamed(hf, tensors, in_fp8=in_fp8), path / "model.safetensors")
    return path


def shards(hf: dict[str, Any], tensors: Tensors, layout: ParallelLayout, rank: int, *, mtp: bool = True) -> Tensors:
    """Tensors of a rank, by name of the global parameter."""
    config, coords = ModelConfig.from_hf(hf), layout.coordinates(rank)
    return {
        param.name: shard(param, join(param, tensors), layout, coords).clone()
        for param in params_of(config)
        if holds(param, config, layout, coords) and (mtp or param.where != Where.MTP)
    }
