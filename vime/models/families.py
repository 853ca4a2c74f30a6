"""Model families, and queries that apply to all of them. Without torch, since the planner counts with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

from vime.models import deepseek_v3, llama, qwen3
from vime.models.config import ModelConfig, family_of, register
from vime.models.namemap import Param, Where
from vime.recipe.parallel import ParallelLayout

register(deepseek_v3)
register(qwen3)
register(llama)


@functools.lru_cache(maxsize=8)
def params_of(config: ModelConfig) -> tuple[Param, ...]:
    """All parameters of a model, ordered as embedding, head, decoder layers, MTP layers."""
    return family_of(config).params(config)


def megatron_config(config: ModelConfig) -> dict[str, Any]:
    """Keyword values of Megatron's TransformerConfig (MLATransformerConfig for latent attention)."""
    return family_of(config).megatron_config(config)


def gpt_arguments(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's GPTModel that depend on the model alone."""
    return family_of(config).gpt_arguments(config)


def count(params: Iterable[Param]) -> int:
    """Total elements of these parameters, each counted once (without copies in the checkpoint)."""
    return sum(math.prod(param.shape) for param in params)


def stage_of(param: Param, layout: ParallelLayout, num_layers: int) -> int:
    """Pipeline stage that holds a parameter, ignoring the tied output head's copy of the embedding."""
    if param.where == Where.EMBEDDING:
        return 0
    if param.where == Where.DECODER:
        assert param.layer is not None
        return next(i for i, layers in enumerate(layout.stage_layers(num_layers)) if param.layer in layers)
    return layout.pp - 1
