"""Advantage estimators: functions of a rollout's rewards, KL and masks, the same on every rank.

Each is named by an entry of `vime.recipe.algorithms.ESTIMATORS`, takes `ScoredSamples` and the recipe's
`AlgorithmOptions`, and returns one tensor of advantages, fp64 [length], for each sample. Values at untrained tokens
are never used. All arithmetic is in float64: sums over 10^7 tokens and groups of equal rewards come out exact.
Terms of `vime.recipe.algorithms.ADVANTAGE_TERMS` are added to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vime.recipe.schema import AlgorithmOptions

_GROUP_EPSILON = 1e-6
_VARIANCE_EPSILON = 1e-8


@dataclass(frozen=True)
class ScoredSamples:
    """All conversations of a rollout, group by group. The branches of one are one sample, behind one another."""

    rewards: tuple[Tensor, ...]
    """fp64 [samples of the group], for each group."""
    masks: tuple[Tensor, ...]
    """fp32 [length], for each sample: 0 at tokens that are not trained on."""
    kl: tuple[Tensor, ...] | None = None
    """fp64 [length], for each sample: estimates of KL(old || reference) a token, 0 at untrained tokens; None without
    `--kl-coef`."""

    def spread(self, values: Tensor) -> list[Tensor]:
        """A value of each sample, [samples], at each of its tokens."""
        return [value.expand(len(mask)) for value, mask in zip(values.unbind(), self.masks, strict=True)]

    def rewards_less_kl(self, coefficient: float) -> list[Tensor]:
        """R - coefficient x sum of the sample's KL, group by group."""
        if self.kl is None:
            return list(self.rewards)
        sums = torch.stack([kl.sum() for kl in self.kl]).split([len(group) for group in self.rewards])
        return [group - coefficient * taken for group, taken in zip(self.rewards, sums, strict=True)]

    def returns(self, values: Tensor, coefficient: float) -> list[Tensor]:
        """A value of each sample at its last token, less coefficient x KL at each, summed from each token on."""
        spread = self.spread(values)
        if self.kl is None:
            return spread
        later = [kl.flip(0).cumsum(0).flip(0) for kl in self.kl]
        return [value - coefficient * rest for value, rest in zip(spread, later, strict=True)]


@dataclass(frozen=True)
class DistilledTokens:
    """All response tokens of a rollout, sample by sample; [n] each."""

    old: Tensor
    """The student's log-probs before the rollout's first step."""
    teacher: Tensor
    mask: Tensor
    """0 at tokens that are not trained on."""


def group_advantages(rewards: Tensor, *, over_deviation: bool = True) -> Tensor:
    """GRPO's advantages of one group, [G] -> [G]: (R - mean) / (std + 1e-6), with the unbiased standard deviation.

    A group of one, or of equal rewards, gives zeros. DeepSeekMath (arXiv 2402.03300), section 4.1. Without
    `over_deviation` R - mean, Dr.GRPO's (arXiv 2503.20783).
    """
    if rewards.numel() < 2 or bool((rewards == rewards[0]).all()):
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred / (rewards.std() + _GROUP_EPSILON) if over_deviation else centred


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13) of a response of `length` tokens, 0 to 1.

    0 up to `longest` - `buffer` tokens, then a straight line to 1 at `longest`.
    """
    return min(1.0, max(0.0, (length - (longest - buffer)) / buffer))


def whiten(columns: Sequence[Tensor], masks: Sequence[Tensor], over: Literal["tokens", "samples"]) -> list[Tensor]:
    """Bring advantages to zero mean and unit variance over the rollout: (A - mean) / sqrt(var + 1e-8), unbiased.

    `tokens` counts every trained token once, as OpenRLHF, verl and slime do; a long sample weighs more. `samples`
    counts every sample with a trained token once, by the mean over its trained tokens.
    """
    trained = [column[mask > 0] for column, mask in zip(columns, masks, strict=True)]
    if over == "samples":
        trained = [values.mean().reshape(1) for values in trained if values.numel()]
    values = torch.cat([torch.zeros(0, dtype=torch.float64), *trained])
    if values.numel() < 2:
        return [torch.zeros_like(column) for column in columns]
    return [(column - values.mean()) * (values.var() + _VARIANCE_EPSILON).rsqrt() for column in columns]


def grpo(samples: ScoredSamples, options: AlgorithmOptions) -> list[Tensor]:
    """`group_advantages`, the same at every token of a sample; whitened with `--normalize-advantages`.

    With `--kl-coef` the reward is first lessened by the KL summed over the sample, as verl does for an outcome reward;
    slime leaves `--kl-coef` without effect here.
    """
    groups = samples.rewards_less_kl(options.kl_coef)
    over_deviation = not options.disable_grpo_std_normalization
    values = torch.cat([group_advantages(group, over_deviation=over_deviation) for group in groups])
    columns = samples.spread(values)
    return (
        whiten(columns, samples.masks, options.normalize_advantages_over) if options.normalize_advantages else columns
    )


def reinforce_plus_plus(samples: ScoredSamples, options: AlgorithmOptions) -> list[Tensor]:
    """REINFORCE++ (arXiv 2501.03262): A_t = R - coefficient x sum of KL from t on, whitened over the rollout.

    The KL estimate is k1 = log p_old - log p_ref by default. OpenRLHF and slime compute the same; verl whitens each
    token's return too, but ends the sum at the sample's end-of-text token.
    """
    columns = samples.returns(torch.cat(samples.rewards), options.kl_coef)
    return whiten(columns, samples.masks, options.normalize_advantages_over)


def reinforce_plus_plus_baseline(samples: ScoredSamples, options: AlgorithmOptions) -> list[Tensor]:
    """REINFORCE++-baseline (arXiv 2501.03262): as REINFORCE++, with the group's mean taken off the reward first.

    slime takes only the token's own KL off, not that of the tokens after it.
    """
    centred = [group - group.mean() for group in samples.rewards]
    columns = samples.returns(torch.cat(centred), options.kl_coef)
    return whiten(columns, samples.masks, options.normalize_advantages_over)


def zero(samples: ScoredSamples, options: AlgorithmOptions) -> list[Tensor]:
    """No advantage from rewards, so that on-policy distillation alone teaches; rewards are only measured."""
    return samples.spread(torch.zeros(len(samples.masks), dtype=torch.float64))


def reverse_kl(tokens: DistilledTokens, options: AlgorithmOptions) -> Tensor:
    """-coefficient x (log p_old - log p_teacher) at trained tokens and 0 at others, fp64 [n].

    The student sampled the token, so log p_old - log p_teacher estimates the reverse KL(student || teacher) of its
    position without bias, and the policy gradient of this advantage is that KL's descent. A token answers for its own
    position alone (a discount of 0), as in Thinking Machines Lab's "On-Policy Distillation" (2025), slime and tinker's
    cookbook; MiniLLM (arXiv 2306.08543) adds the positions after it.
    """
    difference = tokens.old.double() - tokens.teacher.double()
    return torch.where(tokens.mask > 0, -options.opd_kl_coef * difference, 0.0)
