"""Llama-shaped dense models: grouped-query attention without head norms. Uses dense Qwen3's Megatron side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vime.models import reading
from vime.models.config import ModelConfig
from vime.models.qwen3 import gpt_arguments, megatron_config, params

__all__ = ["ARCHITECTURES", "gpt_arguments", "megatron_config", "params", "read"]

ARCHITECTURES = ("LlamaForCausalLM",)


def read(hf: Mapping[str, Any]) -> ModelConfig:
    """Read the model of a `config.json`."""
    return reading.grouped(hf)
