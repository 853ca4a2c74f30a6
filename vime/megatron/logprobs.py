"""Log-probabilities and entropy of tokens from vocabulary-parallel logits, without a full fp32 copy of the logits.

Tokens are worked on in chunks: forward keeps one fp32 number a token (the log of the sum of exponentials), and backward
writes the gradient over the logits' own type chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 1024


def token_log_probs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and the entropy of the distribution, both fp32 [T] in nats.

    `logits` is [T, V / tensor-parallel size], this rank's slice of the vocabulary in rank order of `group` (None: the
    whole vocabulary); `targets` int64 [T] in the whole vocabulary. Both results carry gradients to the logits; the
    entropy is None unless asked for.
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive")
    log_probs, entropy = _TokenLogProbs.apply(logits, targets, 1.0 / temperature, group, with_entropy, chunk)
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
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        tokens, width = logits.shape
        first = 0 if group is None else dist.get_rank(group) * width
        local = targets - first
        here = (local >= 0) & (local < width)
        log_sum = torch.empty(tokens, dtype=torch.float32, device=logits.device)
        log_probs = torch.empty_like(log_sum)
        # Mean of the scaled logits under the distribution: the entropy is log_sum less this.
        mean = torch.empty_like(log_sum) if with_entropy else log_sum.new_zeros(0)
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            values = logits[part].float() * scale
            highest = _all_reduce(values.max(dim=-1).values, dist.ReduceOp.MAX, group)
            picked = values.gather(1, local[part].clamp(0, width - 1).unsqueeze(1)).squeeze(1)
            picked = torch.where(here[part], picked, torch.zeros_like(picked))
            if with_entropy:
                exponentials = torch.exp(values - highest.unsqueeze(1))
                sums = torch.stack([exponentials.sum(-1), picked, (exponentials * values).sum(-1)])
            else:
                sums = torch.stack([values.sub_(highest.unsqueeze(1)).exp_().sum(-1), picked])
            sums = _all_reduce(sums, dist.ReduceOp.SUM, group)
            log_sum[part] = highest + sums[0].log()
            log_probs[part] = sums[1] - log_sum[part]
            if with_entropy:
                mean[part] = sums[2] / sums[0]
        ctx.save_for_backward(logits, local, here, log_sum, mean)
        ctx.scale, ctx.with_entropy, ctx.chunk = scale, with_entropy, chunk
        entropy = log_sum - mean if with_entropy else mean
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad_log_probs, grad_entropy = gradients
        logits, local, here, log_sum, mean = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for start in range(0, logits.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, logits.shape[0]))
            values = logits[part].float() * ctx.scale
            p = torch.exp(values - log_sum[part].unsqueeze(1))
            # d log p_t / d z_i = [i = t] - p_i;  d H / d z_i = -p_i (z_i - mean)
            weight = -grad_log_probs[part].unsqueeze(1)
            if ctx.with_entropy:
                weight = weight - grad_entropy[part].unsqueeze(1) * (values - mean[part].unsqueeze(1))
            p.mul_(weight)
            rows = here[part].nonzero().squeeze(1)
            columns = local[part][rows]
            p[rows, columns] += grad_log_probs[part][rows]
            gradient[part] = p.mul_(ctx.scale).to(logits.dtype)
        return gradient, None, None, None, None, None


def _all_reduce(values: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
