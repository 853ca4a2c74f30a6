"""Notes about settings that give no training signal, a biased one, or have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vime.recipe.flags import flag
from vime.recipe.schema import Recipe

OF_A_GROUP = frozenset({"grpo", "gspo", "cispo", "reinforce_plus_plus_baseline"})
"""Estimators that compare a sample with its group."""
_TEMPLATES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
_THINKS = "</think>"


def teaching_notes(recipe: Recipe) -> list[str]:
    """One line for each such setting, with a remedy."""
    if recipe.algorithm.loss_type != "policy_loss":
        return list(_without_effect(recipe))
    return [*_groups_of_one(recipe), *_biased(recipe), *_without_answers(recipe), *_without_effect(recipe)]


def _groups_of_one(recipe: Recipe) -> Iterator[str]:
    rollout, estimator = recipe.rollout, recipe.algorithm.advantage_estimator
    if rollout.n_samples_per_prompt != 1:
        return
    if estimator in OF_A_GROUP and not recipe.algorithm.use_opd:
        yield (
            f"--n-samples-per-prompt 1 teaches nothing with --advantage-estimator {estimator}: in a group of one every "
            "advantage is 0; give 2 or more"
        )
    if rollout.dynamic_sampling_filter_path == "check_reward_nonzero_std":
        yield (
            "--n-samples-per-prompt 1 can never pass --dynamic-sampling-filter-path check_reward_nonzero_std: a group "
            "of one has no spread; give 2 or more, or no filter"
        )


def _biased(recipe: Recipe) -> Iterator[str]:
    rollout, algorithm = recipe.rollout, recipe.algorithm
    for name, value, whole in (("top-p", rollout.rollout_top_p, 1.0), ("top-k", rollout.rollout_top_k, -1)):
        if value != whole and not (name == "top-k" and value == 0):
            yield (
                f"--rollout-{name} {value:g} biases training: tokens outside of it are never tried, while the policy's "
                f"gradient is that of all tokens; give {whole:g}"
            )
    ahead = recipe.rollout.partial_rollout or not recipe.resources.colocate
    if rollout.max_staleness > 0 and ahead and not algorithm.corrections:
        yield (
            f"--max-staleness {rollout.max_staleness} trains on tokens of older weights as if they were new: give "
            "--use-tis to weight them, or --max-staleness 0"
        )


def _without_answers(recipe: Recipe) -> Iterator[str]:
    folder = recipe.checkpoint.hf_checkpoint
    if recipe.rollout.rm_type != "deepscaler" or folder is None:
        return
    texts = [Path(folder, name) for name in _TEMPLATES if Path(folder, name).is_file()]
    if texts and not any(_THINKS in text.read_text(encoding="utf-8", errors="replace") for text in texts):
        yield (
            f"--rm-type deepscaler grades what follows {_THINKS}, which the chat template of {folder} does not know: "
            "answers without it get 0; give --rm-type math for a model that does not think aloud"
        )


def _without_effect(recipe: Recipe) -> Iterator[str]:
    """Notes on given options that have no effect without another one."""
    groups = {
        "wandb": (recipe.misc.use_wandb, "--use-wandb", recipe.misc,
                  ("wandb_project", "wandb_entity", "wandb_group", "wandb_name", "wandb_tags", "wandb_mode")),
        "remote": (recipe.rollout.rm_type == "remote", "--rm-type remote", recipe.rollout, ("rm_url",)),
        "partial": (recipe.rollout.partial_rollout, "--partial-rollout", recipe.rollout,
                    ("mask_offpolicy_in_partial_rollout",)),
        "template": (recipe.rollout.apply_chat_template, "--apply-chat-template", recipe.rollout,
                     ("apply_chat_template_kwargs",)),
        "recompute": (recipe.perf.recompute_granularity == "full", "--recompute-granularity full", recipe.perf,
                      ("recompute_method", "recompute_num_layers")),
        "warmup": (recipe.optimizer.lr_decay_style != "constant", "another --lr-decay-style than constant",
                   recipe.optimizer, ("lr_decay_iters",)),
        "tools": (recipe.agent.environment == "tools", "--environment tools", recipe.agent, ("tools",)),
        "kl": (recipe.algorithm.use_kl_loss, "--use-kl-loss", recipe.algorithm, ("kl_loss_coef",)),
    }  # fmt: skip
    if not recipe.algorithm.use_opd:
        teacher = ((recipe.algorithm, ("opd_kl_coef",)), (recipe.teacher, type(recipe.teacher).model_fields))
        given = [flag(name) for options, names in teacher for name in names if name in options.model_fields_set]
        if given:
            yield f"{', '.join(given)}: no effect without --use-opd"
    for on, needed, options, names in groups.values():
        given = [flag(name) for name in names if getattr(options, name)]
        if given and not on:
            yield f"{', '.join(given)}: no effect without {needed}"
