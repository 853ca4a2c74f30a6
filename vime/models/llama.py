"""Llama-shaped dense models: grouped-query attention without head norms. Megatron's side is that of dense Qwen3."""

from __future__ import annotations

from vime.models.qwen3 import gpt_arguments, megatron_config, params

__all__ = ["gpt_arguments", "megatron_config", "params"]
