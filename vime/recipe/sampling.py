"""Sampling settings of training and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplingSettings:
    """How the engines draw tokens."""

    max_tokens: int
    """Longest response, in tokens."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    """-1 takes all tokens."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()

    @property
    def truncated(self) -> bool:
        """True if top-p or top-k excludes tokens from the draw."""
        return self.top_p < 1 or self.top_k > 0
