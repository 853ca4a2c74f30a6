"""Floating-point operations of training, and their share of a GPU's peak."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Where

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s, by a substring of the device's name, from the vendor's data sheets (SXM)."""


@functools.lru_cache(maxsize=8)
def active_parameters(config: ModelConfig) -> int:
    """Parameters that a token passes through: only the chosen routed experts, neither embedding nor MTP layers."""
    share = config.moe.top_k / config.moe.num_experts if config.moe else 1.0
    chosen = float(config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)
    for param in params_of(config):
        if not param.buffer and param.where not in (Where.EMBEDDING, Where.MTP):
            chosen += math.prod(param.shape) * (share if param.expert is not None else 1.0)
    return round(chosen)


def training_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """FLOPs of forward and backward passes over sequences of these lengths, without recomputation.

    6 per parameter and token, and for causal attention 3 L n² heads (query-key + value width) per sequence of n tokens
    (Kaplan et al. 2020, "Scaling Laws for Neural Language Models"; Chowdhery et al. 2022, "PaLM", appendix B, halved).
    """
    if config.mla is not None:
        width = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim + config.mla.v_head_dim
    else:
        width = 2 * config.head_dim
    attention = 3.0 * config.num_layers * config.num_attention_heads * width
    return 6.0 * active_parameters(config) * sum(lengths) + attention * sum(n * n for n in lengths)


def peak_flops(device: str) -> float | None:
    """Peak FLOP/s of a device by name; None if unknown, so that no utilisation is invented."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device.upper()), None)


def utilisation(config: ModelConfig, lengths: Sequence[int], *, seconds: float, gpus: int, device: str) -> float | None:
    """Model FLOPs utilisation of training these sequences on `gpus` GPUs; None if the peak is unknown."""
    peak = peak_flops(device)
    if peak is None or seconds <= 0:
        return None
    return training_flops(config, lengths) / (seconds * gpus * peak)
