"""Policy losses, KL and their reduction: pure functions of tensors.

Token tensors are flat, [T] fp32 over all tokens of a micro-batch, in nats; a mask or weight of 0 keeps a token out,
and its other values may then be anything, NaN included. How tokens are split over micro-batches, data- and
context-parallel ranks never enters: `token_weights` fixes every token's share of the global batch, and losses are sums
of weight x token loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vime.recipe.algorithms import KLType

# exp of anything above is infinite in fp32, and infinity times a clipped gradient of 0 is NaN.
_MAX_LOG_RATIO = 20.0
_KL_CLAMP = 10.0


def token_weights(masks: Sequence[Tensor], *, per_token: bool, length: int | None = None) -> list[Tensor]:
    """Every token's share of the mean over a global batch; without `length` all weights together sum to 1.

    `masks` are the samples' loss masks, [length]. Per sample (the default): mask / Σ mask of the sample / samples; a
    sample without a trained token counts as a sample with loss 0. Per token: mask / Σ mask of the batch. With a
    constant `length`: mask / length / samples, which has no bias towards short right answers and long wrong ones
    (Dr.GRPO, arXiv 2503.20783, and verl's `seq-mean-token-sum-norm`).
    """
    floats = [mask.to(torch.float32) for mask in masks]
    if length is not None:
        return [mask / length / len(floats) for mask in floats]
    if per_token:
        total = max(float(sum(mask.sum() for mask in floats)), 1.0)
        return [mask / total for mask in floats]
    return [mask / mask.sum().clamp(min=1.0) / len(floats) for mask in floats]


def kl_divergence(log_probs: Tensor, reference: Tensor, kind: KLType) -> Tensor:
    """Per-token estimate of KL(π ‖ π_ref) from sampled tokens, with d = log π - log π_ref.

    k1 = d; k2 = d²/2; k3 = e^(-d) - 1 + d; low_var_kl = k3 clamped to ±10. Schulman, "Approximating KL divergence".
    """
    d = log_probs - reference
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    d = d.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    k3 = torch.exp(-d) - 1 + d
    return k3.clamp(-_KL_CLAMP, _KL_CLAMP) if kind == "low_var_kl" else k3


@dataclass(frozen=True)
class TokenLoss:
    """Per-token loss, [T], and whether the clip decided it, [T] bool."""

    loss: Tensor
    clipped: Tensor


def clipped_policy_loss(
    log_ratio: Tensor,
    advantages: Tensor,
    *,
    eps_clip: float,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> TokenLoss:
    """PPO's clipped objective: r = exp(log_ratio), l = max(-r A, -clip(r, 1 - ε, 1 + ε_high) A).

    `eps_clip_high` is DAPO's clip-higher (arXiv 2503.14476). `eps_clip_c` c > 1 is the dual clip (arXiv 1912.09729):
    where A < 0, l = min(l, -c A).
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    r = torch.exp(log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    plain = -r * advantages
    bounded = -r.clamp(1 - eps_clip, 1 + high) * advantages
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if eps_clip_c is not None:
        limit = -eps_clip_c * advantages
        dual = (advantages < 0) & (limit < loss)
        loss = torch.where(dual, limit, loss)
        clipped = clipped | dual
    return TokenLoss(loss, clipped)


def sequence_log_ratio(log_probs: Tensor, sequence_mean: Tensor) -> Tensor:
    """GSPO's log ratio of every token (arXiv 2507.18071, eq. 14): its sample's mean, with the token's gradient.

    `sequence_mean`, [T], is the mean of log π - log π_old over the trained tokens of the token's sample, without
    gradient (context parallelism sums it over ranks).
    """
    return sequence_mean.detach() + log_probs - log_probs.detach()


def cispo_loss(
    log_probs: Tensor, log_ratio: Tensor, advantages: Tensor, *, eps_clip: float, eps_clip_high: float | None = None
) -> TokenLoss:
    """CISPO (arXiv 2506.13585, eq. 4): l = -sg(clip(r, 1 - ε, 1 + ε_high)) A log π; no token is dropped.

    The paper trains without the lower bound, which `eps_clip` 1 gives here; with the default 0.2 a token whose
    probability fell still counts with weight 0.8. verl clips on both sides too.
    """
    high = eps_clip if eps_clip_high is None else eps_clip_high
    plain = ratio(log_ratio)
    weight = plain.clamp(1 - eps_clip, 1 + high)
    return TokenLoss(-weight * advantages * log_probs, weight != plain)


def ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) without gradient, finite in fp32."""
    return torch.exp(log_ratio.detach().clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO))


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Σ weight x value over the tokens of weight above 0; other tokens add nothing, whatever they hold."""
    counted = weights > 0
    return (torch.where(counted, values, torch.zeros_like(values)) * weights).sum()
