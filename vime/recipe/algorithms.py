"""Tables of advantage estimators and their terms, policy losses and mismatch corrections, read by recipe, plan,
trainer and docs.

An entry names its function as `module:function`, so that a login node reads the tables without torch. A name that is
in no table but has that form is a plug-in of the same kind; `docs/extending.md` shows one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KLType = Literal["k1", "k2", "k3", "low_var_kl"]
Column = Literal["old", "reference", "rollout", "teacher"]
"""Log-probs of every response token: the trainer's before the rollout's first step, the reference model's, the
engine's and the teacher's."""


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of every token, `vime.megatron.policy_losses`."""

    function: str
    """`module:function` that takes `TokenTerms` and `AlgorithmOptions` and gives a `TokenLoss`."""
    formula: str
    source: str
    flags: tuple[str, ...] = ()
    """Options that it reads."""
    columns: tuple[Column, ...] = ()
    """Columns that it needs whatever the recipe says."""


@dataclass(frozen=True)
class Estimator:
    """An advantage of every token, `vime.megatron.estimators`."""

    function: str
    """`module:function` that takes `ScoredSamples` and `AlgorithmOptions` and gives a tensor for each sample."""
    formula: str
    source: str
    policy_loss: str = "ppo_clip"
    """The loss without `--policy-loss-type`."""
    flags: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()


_GRPO_FLAGS = (
    "disable_grpo_std_normalization",
    "kl_coef",
    "kl_reward_type",
    "normalize_advantages",
    "normalize_advantages_over",
)
_GRPO = "(R - mean) / (std + 1e-6) in the group"
_GRPO_SOURCE = "DeepSeekMath, arXiv 2402.03300, section 4.1"

ESTIMATORS: Mapping[str, Estimator] = {
    "grpo": Estimator("vime.megatron.estimators:grpo", _GRPO, _GRPO_SOURCE, flags=_GRPO_FLAGS),
    "gspo": Estimator("vime.megatron.estimators:grpo", _GRPO, _GRPO_SOURCE, policy_loss="gspo", flags=_GRPO_FLAGS),
    "cispo": Estimator("vime.megatron.estimators:grpo", _GRPO, _GRPO_SOURCE, policy_loss="cispo", flags=_GRPO_FLAGS),
    "reinforce_plus_plus": Estimator(
        "vime.megatron.estimators:reinforce_plus_plus",
        "R less the KL from each token on, whitened over the rollout's tokens",
        "arXiv 2501.03262, REINFORCE++",
        flags=("kl_coef", "kl_reward_type", "normalize_advantages_over"),
    ),
    "reinforce_plus_plus_baseline": Estimator(
        "vime.megatron.estimators:reinforce_plus_plus_baseline",
        "R less the group's mean and the KL from each token on, whitened over the rollout's tokens",
        "arXiv 2501.03262, REINFORCE++-baseline",
        flags=("kl_coef", "kl_reward_type", "normalize_advantages_over"),
    ),
    "on_policy_distillation": Estimator(
        "vime.megatron.estimators:zero",
        "0, so that the term of --use-opd is the whole advantage",
        "Thinking Machines Lab, On-Policy Distillation, 2025",
    ),
}
PURE_DISTILLATION = "on_policy_distillation"
"""The estimator that leaves the advantages to `--use-opd`."""


@dataclass(frozen=True)
class AdvantageTerm:
    """A term that a switch adds to the advantages of any estimator."""

    function: str
    """`module:function` that takes `DistilledTokens` and `AlgorithmOptions` and gives a tensor of all tokens."""
    formula: str
    source: str
    flags: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()


ADVANTAGE_TERMS: Mapping[str, AdvantageTerm] = {
    "use_opd": AdvantageTerm(
        "vime.megatron.estimators:reverse_kl",
        "-coef (log p_old - log p_teacher) of the token, added to the estimator's advantage",
        "Thinking Machines Lab, On-Policy Distillation, 2025; MiniLLM, arXiv 2306.08543, for the reverse KL",
        flags=("opd_kl_coef",),
        columns=("old", "teacher"),
    ),
}
"""By the switch that turns it on."""

POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "ppo_clip": PolicyLoss(
        "vime.megatron.policy_losses:ppo_clip",
        "max(-r A, -clip(r, 1 - eps, 1 + high) A); with A < 0 at most -c A",
        "PPO, arXiv 1707.06347; clip-higher, DAPO, arXiv 2503.14476; dual clip, arXiv 1912.09729",
        flags=("eps_clip", "eps_clip_high", "eps_clip_c"),
    ),
    "gspo": PolicyLoss(
        "vime.megatron.policy_losses:gspo",
        "the same with one ratio a sample, the geometric mean of its tokens' ratios",
        "GSPO, arXiv 2507.18071, equation 14",
        flags=("eps_clip", "eps_clip_high", "eps_clip_c"),
    ),
    "cispo": PolicyLoss(
        "vime.megatron.policy_losses:cispo",
        "-sg(clip(r, 1 - eps, 1 + high)) A log p; no token is dropped",
        "CISPO, MiniMax-M1, arXiv 2506.13585, equation 4",
        flags=("eps_clip", "eps_clip_high"),
    ),
}


@dataclass(frozen=True)
class Correction:
    """A weight of every token for the mismatch of trainer and engine, `vime.megatron.corrections`."""

    function: str
    """`module:function` that takes `RatioTerms` and `AlgorithmOptions` and gives weights."""
    formula: str
    source: str
    flags: tuple[str, ...] = ()


_BAND = ("tis_clip", "tis_clip_low")
_SPEED_KILLS = "Liu et al., When Speed Kills Stability, 2025 (sequence-level importance sampling)"

CORRECTIONS: Mapping[str, Correction] = {
    "tis": Correction(
        "vime.megatron.corrections:tis",
        "clip(r, low, clip), r = p_old / p_engine of the token",
        "Yao et al., Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025",
        _BAND,
    ),
    "icepop": Correction(
        "vime.megatron.corrections:icepop",
        "r where low <= r <= clip, else 0",
        "IcePop, Ring-1T, arXiv 2510.18855",
        _BAND,
    ),
    "seq_tis": Correction(
        "vime.megatron.corrections:seq_tis", "clip(product of r over the sample, low, clip)", _SPEED_KILLS, _BAND
    ),
    "seq_mis": Correction(
        "vime.megatron.corrections:seq_mis",
        "the product of r over the sample where low <= it <= clip, else 0",
        _SPEED_KILLS,
        _BAND,
    ),
    "geo_mask": Correction(
        "vime.megatron.corrections:geo_mask",
        "1 where low <= geometric mean of r over the sample <= high, else 0",
        _SPEED_KILLS,
        ("geo_mask_low", "geo_mask_high"),
    ),
    "opsm": Correction(
        "vime.megatron.corrections:opsm",
        "0 where A < 0 and the sample's mean of log p_engine - log p is above delta, else 1",
        "off-policy sequence masking, DeepSeek-V3.2, arXiv 2512.02556",
        ("opsm_delta",),
    ),
}


def is_plugin(name: str) -> bool:
    """Whether a name has the form `module:function`."""
    module, colon, function = name.partition(":")
    return bool(colon and module and function)


def estimator(name: str) -> Estimator:
    """The entry of `--advantage-estimator`."""
    return ESTIMATORS[name] if name in ESTIMATORS else Estimator(name, "plug-in", name)


def correction(name: str) -> Correction:
    """The entry of a name of `--mismatch-correction`."""
    return CORRECTIONS[name] if name in CORRECTIONS else Correction(name, "plug-in", name)


def policy_loss(name: str | None, of_estimator: str) -> PolicyLoss:
    """The entry of `--policy-loss-type`, by default that of the estimator."""
    chosen = name or estimator(of_estimator).policy_loss
    return POLICY_LOSSES[chosen] if chosen in POLICY_LOSSES else PolicyLoss(chosen, "plug-in", chosen)
