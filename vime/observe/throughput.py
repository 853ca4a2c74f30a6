"""Tokens per second per GPU over whole rollouts: generation, training and sync together, on all of the run's GPUs."""

from __future__ import annotations

from vime.run.plan import Plan
from vime.samples import Rollout


def tokens_per_gpu(plan: Plan, rollout: Rollout, seconds: float) -> dict[str, float]:
    """`perf/tokens_per_gpu_per_s`: prompt and response tokens trained on, divided by seconds and GPUs.

    GPUs are those of trainer, engines and teacher; shared ones count once, and CPU slots count as GPUs.
    """
    slots = {(rank.node, rank.gpu) for rank in plan.trainer_ranks}
    for engine in plan.servers:
        slots |= {(node, gpu) for node, gpus in zip(engine.nodes, engine.gpus, strict=True) for gpu in gpus}
    tokens = sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in rollout.samples)
    if seconds <= 0 or not slots:
        return {}
    return {"perf/tokens_per_gpu_per_s": tokens / seconds / len(slots)}
