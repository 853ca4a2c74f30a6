"""Answers of `/inference/v1/generate`: the fields that are read here, in vLLM's names and shapes."""

from __future__ import annotations

import msgspec

MISSING_LOG_PROB = -9999.0
"""Stands for a log-prob of minus infinity, or for none, in vLLM's answers."""


class TokenLogProb(msgspec.Struct, gc=False):
    logprob: float


class LogProbs(msgspec.Struct, gc=False):
    content: list[TokenLogProb] | None = None


class Span(msgspec.Struct, gc=False):
    """Tokens `start` up to `end` of an answer, sampled with one version of the weights."""

    version: str
    start: int
    end: int


class Choice(msgspec.Struct, gc=False, omit_defaults=True):
    token_ids: list[int] | None = None
    logprobs: LogProbs | None = None
    finish_reason: str | None = None
    weight_versions: list[Span] | None = None
    routed_experts: str | None = None
    """Base64 of an npy file."""


class Answer(msgspec.Struct, gc=False, omit_defaults=True):
    choices: list[Choice] = msgspec.field(default_factory=list)
    prompt_logprobs: list[dict[str, TokenLogProb] | None] | None = None
    """For each token of the prompt, the log-probs at its place by token; None for the first, which has none."""
