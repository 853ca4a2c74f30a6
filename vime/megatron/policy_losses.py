"""Policy losses of one token: the functions that `vime.recipe.algorithms.POLICY_LOSSES` names.

Each takes `TokenTerms` and the recipe's `AlgorithmOptions` and returns a `TokenLoss`; the formulas are in
`vime.megatron.losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vime.megatron import losses
from vime.megatron.losses import TokenLoss

if TYPE_CHECKING:
    from vime.recipe.schema import AlgorithmOptions


@dataclass(frozen=True)
class TokenTerms:
    """Tokens of a rank's part of a micro-batch: fp32 [t] each, in nats; only `log_probs` has a gradient."""

    log_probs: Tensor
    old: Tensor
    """The trainer's log-probs before the rollout's first step."""
    advantages: Tensor
    weights: Tensor
    """Each token's share of the global batch; 0 at tokens that are not trained on."""
    sequence_mean: Callable[[Tensor], Tensor]
    """[t] -> [t]: at every token the mean over its sample's trained tokens, without gradient, over all
    context-parallel ranks."""


def ppo_clip(terms: TokenTerms, options: AlgorithmOptions) -> TokenLoss:
    """The clipped objective with a ratio a token."""
    return _clipped(terms.log_probs - terms.old, terms, options)


def gspo(terms: TokenTerms, options: AlgorithmOptions) -> TokenLoss:
    """The clipped objective with a ratio a sample."""
    mean = terms.sequence_mean(terms.log_probs - terms.old)
    return _clipped(losses.sequence_log_ratio(terms.log_probs, mean), terms, options)


def cispo(terms: TokenTerms, options: AlgorithmOptions) -> TokenLoss:
    """The log-probability weighted by a clipped ratio."""
    return losses.cispo_loss(
        terms.log_probs,
        terms.log_probs - terms.old,
        terms.advantages,
        eps_clip=options.eps_clip,
        eps_clip_high=options.eps_clip_high,
    )


def _clipped(log_ratio: Tensor, terms: TokenTerms, options: AlgorithmOptions) -> TokenLoss:
    return losses.clipped_policy_loss(
        log_ratio,
        terms.advantages,
        eps_clip=options.eps_clip,
        eps_clip_high=options.eps_clip_high,
        eps_clip_c=options.eps_clip_c,
    )
