"""A third-party estimator and policy loss, as in `docs/training.md`, and some faulty ones."""

import torch

from vime.megatron.losses import TokenLoss


def leave_one_out(samples, options):
    """RLOO: each reward less the mean of the others of its group."""
    values = torch.cat([(group - group.mean()) * len(group) / max(len(group) - 1, 1) for group in samples.rewards])
    return samples.spread(values)


def plain_policy_gradient(terms, options):
    """-A log p, without ratio or clip."""
    return TokenLoss(-terms.advantages * terms.log_probs, torch.zeros_like(terms.log_probs, dtype=torch.bool))


def one_a_sample(samples, options):
    return torch.cat(samples.rewards)
