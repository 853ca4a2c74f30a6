"""The families of models, and what can be asked of any of them. No torch here: the planner counts with it."""

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
    """All parameters of a model, in the order embedding, head, decoder layers, MTP layers."""
    return family_of(config).params(config)


def megatron_config(config: ModelConfig) -> dict[str, Any]:
    """Plain keyword values of Megatron's TransformerConfig (MLATransformerConfig with latent attention)."""
    return family_of(config).megatron_config(config)


def gpt_arguments(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of Megatron's GPTModel that follow from the model alone."""
    return family_of(config).gpt_arguments(config)


def count(params: Iterable[Param]) -> int:
    """Elements of these parameters, each counted once (copies in the checkpoint are not)."""
    return sum(math.prod(param.shape) for param in params)


def stage_of(param: Param, layout: ParallelLayout, num_layers: int) -> int:
    """Pipeline stage that holds a parameter (the tied output head's copy of the embedding aside)."""
    if param.where == Where.EMBEDDING:
        return 0
    if param.where == Where.DECODER:
        assert param.layer is not None
        return next(i for i, layers in enumerate(layout.stage_layers(num_layers)) if param.layer in layers)
    return layout.pp - 1
