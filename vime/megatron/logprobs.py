"""Log-probabilities and entropy of tokens from vocabulary-parallel logits, without a full fp32 copy of the logits.

Forward keeps the log of the sum of exponentials and, for the entropy, the mean logit, two fp32 numbers a token;
backward makes one tensor, the gradient in the logits' own type. On a GPU each is one kernel
(`vime.megatron.logprobs_gpu`); elsewhere torch's operations work on the tokens in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024
LOWEST = torch.finfo(torch.float32).min
"""Least value of a row's maximum: a slice of the vocabulary may be -inf in whole."""


class Backend(Protocol):
    """The two passes over this rank's logits [T, V / TP]. z is a logit times `scale`, all else fp32 [T].

    `local` is int64 [T], the targets counted from this rank's first column; those outside of it are other ranks'.
    """

    def row_sums(self, logits: Tensor, local: Tensor, scale: float, with_entropy: bool) -> Tensor:
        """max z, z at the target or 0, sum exp(z - max z) and, with entropy, sum exp(z - max z) z: fp32 [3 or 4, T]."""
        ...

    def gradient(
        self,
        logits: Tensor,
        local: Tensor,
        scale: float,
        log_sum: Tensor,
        mean: Tensor | None,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        """Gradient to the logits, in their type; `mean` and `grad_entropy` are None without entropy.

        d log p_t / d z_i = [i = t] - p_i and d H / d z_i = -p_i (z_i - mean), with p_i = exp(z_i - log_sum).
        """
        ...


def token_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk: int = CHUNK_TOKENS,
    fused: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and the entropy of the distribution, both fp32 [T] in nats.

    `logits` is [T, V / tensor-parallel size], this rank's slice of the vocabulary in rank order of `group` (None: the
    whole vocabulary); `targets` int64 [T] in the whole vocabulary. Both results carry gradients to the logits; the
    entropy is None unless asked for. `fused` chooses the kernels for GPUs (None: for logits on a GPU whose columns are
    adjacent); `chunk` is the tokens that the other path works on at a time. Raises ValueError for a temperature that
    is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive")
    if fused is None:
        fused = logits.is_cuda and logits.stride(1) == 1
    backend = _fused() if fused else _Chunks(chunk)
    log_probs, entropy = _TokenLogProbs.apply(logits, targets, 1.0 / temperature, group, with_entropy, backend)
    return log_probs, entropy if with_entropy else None


def draft_cross_entropy(
    draft: Tensor,
    policy: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a draft against the policy's distribution, and the chance that a drafted token is accepted.

    Both logits are [T, V / tensor-parallel size], both results fp32 [T]: - sum p log q with a gradient to the draft
    alone, and sum min(p, q), what speculative sampling accepts of tokens drawn from q (arXiv 2211.17192).
    """
    return _DraftCrossEntropy.apply(draft, policy, 1.0 / temperature, group, chunk)


class _DraftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, draft: Tensor, policy: Tensor, scale: float, group: dist.ProcessGroup | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        entropy = torch.empty(draft.shape[0], dtype=torch.float32, device=draft.device)
        accepted = torch.empty_like(entropy)
        log_sums = torch.empty(2, draft.shape[0], dtype=torch.float32, device=draft.device)
        for start in range(0, draft.shape[0], chunk):
            part = slice(start, min(start + chunk, draft.shape[0]))
            values = torch.stack([draft[part], policy[part]]).float() * scale  # [2, chunk, V / TP]
            highest = _all_reduce(values.max(dim=-1).values, dist.ReduceOp.MAX, group)
            sums = _all_reduce((values - highest.unsqueeze(-1)).exp().sum(-1), dist.ReduceOp.SUM, group)
            log_sums[:, part] = highest + sums.log()
            q, p = torch.exp(values - log_sums[:, part].unsqueeze(-1))
            both = torch.stack([(p * values[0]).sum(-1), torch.minimum(p, q).sum(-1)])
            dot, accepted[part] = _all_reduce(both, dist.ReduceOp.SUM, group)
            entropy[part] = log_sums[0, part] - dot
        ctx.save_for_backward(draft, policy, log_sums)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.mark_non_differentiable(accepted)
        return entropy, accepted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        draft, policy, log_sums = ctx.saved_tensors
        found = torch.empty_like(draft)
        for start in range(0, draft.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, draft.shape[0]))
            values = torch.stack([draft[part], policy[part]]).float() * ctx.scale
            q, p = torch.exp(values - log_sums[:, part].unsqueeze(-1))
            found[part] = ((q - p) * gradients[0][part].unsqueeze(1) * ctx.scale).to(draft.dtype)
        return found, None, None, None, None


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        scale: float,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor]:
        first = 0 if group is None else dist.get_rank(group) * logits.shape[1]
        local = targets - first
        rows = backend.row_sums(logits, local, scale, with_entropy)
        mine, sums = rows[0], rows[1:]
        highest = _all_reduce(mine.clone(), dist.ReduceOp.MAX, group)
        # Exponentials were relative to this rank's maximum; the picked logit is no exponential.
        sums[1:] *= torch.exp(mine - highest)
        picked, total, *dot = _all_reduce(sums, dist.ReduceOp.SUM, group)
        log_sum = highest + total.log()
        # Mean of the scaled logits under the distribution: the entropy is log_sum less this.
        mean = dot[0] / total if with_entropy else None
        ctx.save_for_backward(logits, local, log_sum, mean)
        ctx.scale, ctx.backend = scale, backend
        if mean is not None:
            return picked - log_sum, log_sum - mean
        entropy = log_sum.new_zeros(0)
        ctx.mark_non_differentiable(entropy)
        return picked - log_sum, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad_log_probs, grad_entropy = gradients
        logits, local, log_sum, mean = ctx.saved_tensors
        found = ctx.backend.gradient(
            logits, local, ctx.scale, log_sum, mean, grad_log_probs, None if mean is None else grad_entropy
        )
        return found, None, None, None, None, None


@dataclass(frozen=True)
class _Chunks:
    """The backend of torch's operations, which holds some tokens' logits in fp32 at a time."""

    tokens: int

    def row_sums(self, logits: Tensor, local: Tensor, scale: float, with_entropy: bool) -> Tensor:
        found = torch.empty(3 + with_entropy, logits.shape[0], dtype=torch.float32, device=logits.device)
        for part in self._parts(logits):
            values = logits[part].float() * scale
            highest = values.max(dim=-1).values.clamp_min(LOWEST)
            picked = values.gather(1, local[part].clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
            picked = torch.where(_here(local[part], logits), picked, torch.zeros_like(picked))
            if with_entropy:
                exponentials = torch.exp(values - highest.unsqueeze(1))
                sums = [exponentials.sum(-1), (exponentials * values).sum(-1)]
            else:
                sums = [values.sub_(highest.unsqueeze(1)).exp_().sum(-1)]
            found[:, part] = torch.stack([highest, picked, *sums])
        return found

    def gradient(
        self,
        logits: Tensor,
        local: Tensor,
        scale: float,
        log_sum: Tensor,
        mean: Tensor | None,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
    ) -> Tensor:
        found = torch.empty_like(logits)
        for part in self._parts(logits):
            values = logits[part].float() * scale
            p = torch.exp(values - log_sum[part].unsqueeze(1))
            weight = -grad_log_probs[part].unsqueeze(1)
            if mean is not None and grad_entropy is not None:
                weight = weight - grad_entropy[part].unsqueeze(1) * (values - mean[part].unsqueeze(1))
            p.mul_(weight)
            rows = _here(local[part], logits).nonzero().squeeze(1)
            p[rows, local[part][rows]] += grad_log_probs[part][rows]
            found[part] = p.mul_(scale).to(logits.dtype)
        return found

    def _parts(self, logits: Tensor) -> Iterator[slice]:
        for start in range(0, logits.shape[0], self.tokens):
            yield slice(start, min(start + self.tokens, logits.shape[0]))


def _here(local: Tensor, logits: Tensor) -> Tensor:
    """Mask of the tokens whose target is in this rank's slice."""
    return (local >= 0) & (local < logits.shape[1])


def _fused() -> Backend:
    from vime.megatron import logprobs_gpu

    return logprobs_gpu


def _all_reduce(values: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
