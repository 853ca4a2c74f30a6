"""How well the hardware is used: tokens a second a GPU, model FLOPs utilisation, and what vLLM counts about itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from vime.models.config import ModelConfig
from vime.models.families import count, params_of
from vime.models.namemap import Where

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 operations a second by a part of the device's name, from the vendor's data sheets."""
_COUNTERS = {
    "prefix_cache_queries": "vllm:prefix_cache_queries",
    "prefix_cache_hits": "vllm:prefix_cache_hits",
    "draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
}


def active_parameters(config: ModelConfig) -> int:
    """Parameters that a token passes through: of routed experts only the chosen ones; without embedding and MTP."""
    chosen = 0.0
    share = config.moe.top_k / config.moe.num_experts if config.moe else 1.0
    for param in params_of(config):
        if param.buffer or param.where in (Where.EMBEDDING, Where.MTP):
            continue
        chosen += count([param]) * (share if param.expert is not None else 1.0)
    if config.tie_word_embeddings:
        chosen += config.vocab_size * config.hidden_size
    return round(chosen)


def training_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Operations of forward and backward passes over sequences of these lengths, without what recompute adds.

    6 a parameter and token, and 6 L n² d of causal attention (Kaplan et al. 2020; Korthikanti et al. 2022), d the width
    of queries and values over all heads.
    """
    if config.mla is not None:
        width = config.mla.qk_nope_head_dim + config.mla.qk_rope_head_dim + config.mla.v_head_dim
    else:
        width = 2 * config.head_dim
    attention = 3 * config.num_layers * config.num_attention_heads * width
    return 6.0 * active_parameters(config) * sum(lengths) + float(attention) * sum(n * n for n in lengths)


def peak_flops(device: str) -> float | None:
    """Of a device by its name; None where it is not known, so that no utilisation is invented."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device.upper()), None)


def efficiency(
    config: ModelConfig, lengths: Sequence[int], *, gpus: int, whole_s: float, train_s: float, device: str = ""
) -> dict[str, float]:
    """`perf/tokens_per_gpu_per_s` over the whole rollout and, where the device's peak is known, `perf/mfu` of training.

    `lengths`: tokens of every sample trained on, prompt included; `gpus`: of trainer and engines together.
    """
    found = {"perf/tokens_per_gpu_per_s": sum(lengths) / max(whole_s, 1e-9) / max(gpus, 1)}
    peak = peak_flops(device)
    if peak is not None and train_s > 0:
        found["perf/mfu"] = training_flops(config, lengths) / train_s / (gpus * peak)
    return found


def engine_counters(text: str) -> dict[str, float]:
    """vLLM's counters from its Prometheus page, summed over its engines; a counter it does not keep is missing."""
    found: dict[str, float] = {}
    for name, metric in _COUNTERS.items():
        lines = re.findall(rf"^{re.escape(metric)}(?:_total)?(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
        if lines:
            found[name] = sum(map(float, lines))
    return found


def engine_rates(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Shares between two readings: hits of the prefix cache, accepted draft tokens. A restarted engine counts anew."""

    def grown(name: str) -> float:
        new, old = after.get(name, 0.0), before.get(name, 0.0)
        return new - old if new >= old else new

    rates = {}
    for name, part, whole in (
        ("perf/engine_cache_hit_rate", "prefix_cache_hits", "prefix_cache_queries"),
        ("perf/draft_acceptance_rate", "accepted_tokens", "draft_tokens"),
    ):
        if grown(whole) > 0:
            rates[name] = grown(part) / grown(whole)
    return rates
