"""Options that change what a rank's training makes of a rollout: a recipe in which each matters, and another value.

tests/megatron/test_options_train.py trains with both; tests/planning/test_options_alive.py takes them as shown.
"""

from __future__ import annotations

from typing import Any

Groups = dict[str, dict[str, Any]]

KL = {"use_kl_loss": True, "kl_loss_coef": 0.5}
FAR = {"lr": 0.1, "adam_eps": 1e-8}
"""Steps that move the policy beyond the clipping range within a rollout."""


def algorithm(**options: Any) -> Groups:
    return {"algorithm": options, "optimizer": FAR}


def optimizer(**options: Any) -> Groups:
    return {"optimizer": {"lr": 1e-2, "adam_eps": 1e-8, **options}}


TRAINED: dict[str, tuple[Groups, Any]] = {
    "adam_beta1": (optimizer(), 0.5),
    "adam_beta2": (optimizer(), 0.5),
    "adam_eps": (optimizer(), 1e-2),
    "advantage_estimator": (algorithm(), "reinforce_plus_plus"),
    "calculate_per_token_loss": (algorithm(), True),
    "clip_grad": (optimizer(adam_eps=1.0), 1e-3),
    "constant_loss_length": (algorithm(), 7),
    "disable_grpo_std_normalization": (algorithm(), True),
    "entropy_coef": (algorithm(), 0.5),
    "eps_clip": (algorithm(), 0.01),
    "eps_clip_high": (algorithm(eps_clip=0.01), 0.9),
    "geo_mask_high": (algorithm(mismatch_correction=["geo_mask"], geo_mask_low=0.0, geo_mask_high=100.0), 1e-9),
    "geo_mask_low": (algorithm(mismatch_correction=["geo_mask"], geo_mask_low=0.0, geo_mask_high=100.0), 0.99),
    "kl_coef": (algorithm(), 0.5),
    "kl_loss_coef": (algorithm(**KL), 2.0),
    "kl_loss_type": (algorithm(**KL), "k2"),
    "kl_reward_type": (algorithm(kl_coef=0.5), "k2"),
    "loss_type": (algorithm(), "sft_loss"),
    "lr": (optimizer(), 1e-3),
    "lr_decay_iters": (optimizer(lr_decay_style="linear"), 3),
    "lr_decay_style": (optimizer(), "linear"),
    "lr_warmup_iters": (optimizer(), 4),
    "min_lr": (optimizer(lr_decay_style="linear"), 5e-3),
    "mismatch_correction": (algorithm(), ["tis"]),
    "normalize_advantages": (algorithm(disable_grpo_std_normalization=True), True),
    "normalize_advantages_over": (algorithm(normalize_advantages=True), "samples"),
    "opd_kl_coef": (algorithm(use_opd=True), 3.0),
    "opsm_delta": (algorithm(mismatch_correction=["opsm"], opsm_delta=100.0), 1e-6),
    "overlong_buffer_len": (algorithm(overlong_penalty_factor=1.0, overlong_buffer_len=1), 40),
    "overlong_penalty_factor": (algorithm(overlong_buffer_len=40, overlong_penalty_factor=0.1), 5.0),
    "policy_loss_type": (algorithm(), "cispo"),
    "rollout_temperature": (algorithm(), 0.5),
    "tis_clip": (algorithm(use_tis=True, tis_clip=100.0), 0.5),
    "tis_clip_low": (algorithm(use_tis=True, tis_clip=100.0), 90.0),
    "use_kl_loss": (algorithm(kl_loss_coef=0.5), True),
    "use_opd": (algorithm(), True),
    "use_rollout_logprobs": (algorithm(), True),
    "use_tis": (algorithm(tis_clip=0.5), True),
    "weight_decay": (optimizer(weight_decay=0.0), 0.5),
}
