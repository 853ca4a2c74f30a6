"""From a micro-batch's logits to its share of the loss and of the metrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vime.megatron import losses
from vime.megatron.corrections import RatioTerms
from vime.megatron.logprobs import draft_cross_entropy, token_log_probs
from vime.megatron.microbatch import PackedBatch
from vime.megatron.plugins import function_of
from vime.megatron.policy_losses import TokenTerms
from vime.recipe import algorithms
from vime.recipe.schema import AlgorithmOptions

METRICS = (
    "loss",
    "pg_loss",
    "kl_loss",
    "entropy",
    "pg_clipfrac",
    "ppo_kl",
    "train_rollout_logprob_abs_diff",
    "tis",
    "tis_masked",
    "draft_loss",
    "draft_acceptance",
    "opd_reverse_kl",
)
"""Means over the global batch with the loss's own weights, in this order. `ppo_kl` is the mean of log π_old - log π,
`tis` of the mismatch corrections' weights, `tis_masked` the share of tokens that they give the weight 0,
`draft_acceptance` the chance that a token of the first draft layer is accepted, `opd_reverse_kl` the mean of
log π_old - log π_teacher."""

Columns = Mapping[str, Tensor]
"""fp32 [response tokens] each: `weights`; for the policy loss `advantages`; where there are any `old` (the trainer's
log-probs before the first step), `reference`, `rollout` (the engine's) and `teacher`."""


@dataclass(frozen=True)
class Objective:
    """The recipe's loss of this rank's part of a micro-batch; parts of all ranks and micro-batches add up."""

    options: AlgorithmOptions
    temperature: float
    tensor_group: dist.ProcessGroup | None = None
    """Ranks that share the vocabulary."""
    context_group: dist.ProcessGroup | None = None
    """Ranks that share each sequence."""

    def log_probs(self, logits: Tensor, batch: PackedBatch) -> Tensor:
        """log π of every target at the rollout temperature, fp32 [t]."""
        return token_log_probs(logits, batch.targets, temperature=self.temperature, group=self.tensor_group)[0]

    def __call__(self, logits: Tensor, batch: PackedBatch, columns: Columns) -> tuple[Tensor, Tensor]:
        """Loss, a scalar with gradient, and the `METRICS` without, fp32 [len(METRICS)]. `logits` is [t, V / TP]."""
        log_probs, entropy = token_log_probs(
            logits, batch.targets, temperature=self.temperature, group=self.tensor_group, with_entropy=True
        )
        assert entropy is not None
        weights = batch.column(columns["weights"])
        if self.options.loss_type == "sft_loss":
            loss = losses.weighted_sum(-log_probs, weights)
            return loss, self._metrics({"loss": loss, "entropy": losses.weighted_sum(entropy, weights)}, loss)
        return self._policy(log_probs, entropy, weights, batch, columns)

    def draft(
        self, draft: Sequence[Tensor], policy: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Loss of the draft layers, a scalar with gradient, and the `METRICS` that it adds to.

        For each layer: its logits and the policy's of the same tokens, both [t, V / TP], and the tokens' weights, [t].
        """
        entropies, accepted = [], []
        for mine, theirs, shares in zip(draft, policy, weights, strict=True):
            entropy, chance = draft_cross_entropy(mine, theirs, temperature=self.temperature, group=self.tensor_group)
            entropies.append(losses.weighted_sum(entropy, shares))
            accepted.append(losses.weighted_sum(chance, shares))
        loss = torch.stack(entropies).mean()
        return loss, self._metrics({"draft_loss": loss, "draft_acceptance": accepted[0]}, loss)

    def _policy(
        self, log_probs: Tensor, entropy: Tensor, weights: Tensor, batch: PackedBatch, columns: Columns
    ) -> tuple[Tensor, Tensor]:
        options = self.options
        old = batch.column(columns["old"]) if "old" in columns else log_probs.detach()
        advantages = batch.column(columns["advantages"])
        token = self._token_loss(log_probs, old, advantages, weights, batch)
        values = {"ppo_kl": losses.weighted_sum((old - log_probs).detach(), weights)}
        token_loss = token.loss
        if "rollout" in columns:
            rollout = batch.column(columns["rollout"])
            trainers = log_probs.detach() if options.use_rollout_logprobs else old
            difference = (trainers - rollout).abs()
            values["train_rollout_logprob_abs_diff"] = losses.weighted_sum(difference, weights)
            if self.corrections:
                correction = self._correction(log_probs, old, rollout, advantages, weights, batch)
                token_loss = token_loss * correction
                values["tis"] = losses.weighted_sum(correction, weights)
                values["tis_masked"] = losses.weighted_sum((correction == 0).float(), weights)
        values["pg_loss"] = losses.weighted_sum(token_loss, weights)
        values["pg_clipfrac"] = losses.weighted_sum(token.clipped.float(), weights)
        values["entropy"] = losses.weighted_sum(entropy, weights)
        if "teacher" in columns:
            values["opd_reverse_kl"] = losses.weighted_sum(old - batch.column(columns["teacher"]), weights)
        loss = values["pg_loss"]
        if options.entropy_coef:
            loss = loss - options.entropy_coef * values["entropy"]
        if "reference" in columns:
            divergence = losses.kl_divergence(log_probs, batch.column(columns["reference"]), options.kl_loss_type)
            values["kl_loss"] = losses.weighted_sum(divergence, weights)
            if options.use_kl_loss and options.kl_loss_coef:
                loss = loss + options.kl_loss_coef * values["kl_loss"]
        return loss, self._metrics({**values, "loss": loss}, loss)

    def _token_loss(
        self, log_probs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, batch: PackedBatch
    ) -> losses.TokenLoss:
        mean = functools.partial(self._sequence_mean, weights=weights, batch=batch)
        return self.policy_loss(TokenTerms(log_probs, old, advantages, weights, mean), self.options)

    def _correction(
        self, log_probs: Tensor, old: Tensor, rollout: Tensor, advantages: Tensor, weights: Tensor, batch: PackedBatch
    ) -> Tensor:
        """Product of the mismatch corrections' weights, fp32 [t]."""
        total = functools.partial(self._sequence_sum, weights=weights, batch=batch)
        mean = functools.partial(self._sequence_mean, weights=weights, batch=batch)
        terms = RatioTerms(log_probs.detach(), old, rollout, advantages, total, mean)
        found = [correction(terms, self.options) for correction in self.corrections]
        return functools.reduce(torch.mul, found).detach()

    @functools.cached_property
    def corrections(self) -> tuple[Callable[[RatioTerms, AlgorithmOptions], Tensor], ...]:
        """Functions of the recipe's mismatch corrections."""
        entries = (algorithms.correction(name) for name in self.options.corrections)
        return tuple(function_of(entry.function, "--mismatch-correction") for entry in entries)

    @functools.cached_property
    def policy_loss(self) -> Callable[[TokenTerms, AlgorithmOptions], losses.TokenLoss]:
        """The function of the recipe's policy loss."""
        chosen = algorithms.policy_loss(self.options.policy_loss_type, self.options.advantage_estimator)
        return function_of(chosen.function, "--policy-loss-type")

    def _sequence_mean(self, values: Tensor, weights: Tensor, batch: PackedBatch) -> Tensor:
        """At every token the mean of its sample's trained tokens, over all context-parallel ranks."""
        sums, counts = self._sums(values, weights, batch)
        return (sums / counts.clamp(min=1.0))[batch.samples]

    def _sequence_sum(self, values: Tensor, weights: Tensor, batch: PackedBatch) -> Tensor:
        """At every token the sum over its sample's trained tokens, over all context-parallel ranks."""
        return self._sums(values, weights, batch)[0][batch.samples]

    def _sums(self, values: Tensor, weights: Tensor, batch: PackedBatch) -> Tensor:
        """fp32 [2, samples]: sum of `values` over each sample's trained tokens, and their number."""
        trained = (weights > 0).float()
        counted = torch.where(weights > 0, values.detach(), torch.zeros_like(values))
        sums = torch.zeros(2, batch.count, device=values.device)
        sums.index_add_(1, batch.samples, torch.stack([counted, trained]))
        if self.context_group is not None and self.context_group.size() > 1:
            dist.all_reduce(sums, group=self.context_group)
        return sums

    def _metrics(self, values: Mapping[str, Tensor], like: Tensor) -> Tensor:
        zero = torch.zeros((), device=like.device)
        return torch.stack([values.get(name, zero).detach().float() for name in METRICS])
