"""Corrections of the mismatch of trainer and engine: the functions that `vime.recipe.algorithms.CORRECTIONS` names.

Trainer and engine compute different probabilities for the same tokens, and the engine's are those that were sampled
from. Each function takes `RatioTerms` and the recipe's `AlgorithmOptions` and returns weights of the tokens' losses,
fp32 [t], without gradient. Several are multiplied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vime.megatron.losses import ratio

if TYPE_CHECKING:
    from vime.recipe.schema import AlgorithmOptions


@dataclass(frozen=True)
class RatioTerms:
    """Tokens of a rank's part of a micro-batch: fp32 [t] each, in nats, none with a gradient."""

    log_probs: Tensor
    """The trainer's, now."""
    old: Tensor
    """The trainer's before the rollout's first step."""
    engine: Tensor
    """Those of the engine that sampled the tokens."""
    advantages: Tensor
    sequence_sum: Callable[[Tensor], Tensor]
    """[t] -> [t]: at every token the sum over its sample's trained tokens, over all context-parallel ranks."""
    sequence_mean: Callable[[Tensor], Tensor]

    @property
    def log_ratio(self) -> Tensor:
        """log p_old - log p_engine."""
        return self.old - self.engine


def tis(terms: RatioTerms, options: AlgorithmOptions) -> Tensor:
    """Truncated importance sampling, a weight a token. slime and verl compute the same; verl has no lower bound."""
    return ratio(terms.log_ratio).clamp(options.tis_clip_low, options.tis_clip)


def icepop(terms: RatioTerms, options: AlgorithmOptions) -> Tensor:
    """IcePop: tokens whose ratio leaves the band are masked, the others keep it as their weight."""
    return _inside(ratio(terms.log_ratio), options)


def seq_tis(terms: RatioTerms, options: AlgorithmOptions) -> Tensor:
    """Truncated importance sampling with one ratio a sample, the product of its tokens'."""
    return ratio(terms.sequence_sum(terms.log_ratio)).clamp(options.tis_clip_low, options.tis_clip)


def seq_mis(terms: RatioTerms, options: AlgorithmOptions) -> Tensor:
    """Masked importance sampling: samples whose ratio leaves the band are masked whole."""
    return _inside(ratio(terms.sequence_sum(terms.log_ratio)), options)


def geo_mask(terms: RatioTerms, options: AlgorithmOptions) -> Tensor:
    """Mask samples whose geometric mean of ratios leaves its band, whatever their length."""
    mean = ratio(terms.sequence_mean(terms.log_ratio))
    return ((mean >= options.geo_mask_low) & (mean <= options.geo_mask_high)).float()


def opsm(terms: RatioTerms, options: AlgorithmOptions) -> Tensor:
    """Mask samples of negative advantage that the current policy has moved away from since they were sampled.

    DeepSeek-V3.2 measures from the engine's log-probs, as here; slime from the trainer's old ones.
    """
    moved = terms.sequence_mean(terms.engine - terms.log_probs)
    return torch.where((terms.advantages < 0) & (moved > options.opsm_delta), 0.0, 1.0)


def _inside(values: Tensor, options: AlgorithmOptions) -> Tensor:
    inside = (values >= options.tis_clip_low) & (values <= options.tis_clip)
    return torch.where(inside, values, torch.zeros_like(values))
