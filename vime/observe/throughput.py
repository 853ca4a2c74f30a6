"""Tokens a second a GPU: what a rollout cost all of the run's hardware, generation, training and sync together."""

from __future__ import annotations

from vime.run.plan import Plan
from vime.samples import Rollout


def tokens_per_gpu(plan: Plan, rollout: Rollout, seconds: float) -> dict[str, float]:
    """`perf/tokens_per_gpu_per_s`: prompt and response tokens of the samples trained on, by the rollout's seconds.

    Divided by the GPUs that trainer or engines hold; shared ones count once, and CPU slots are taken for GPUs.
    """
    slots = {(rank.node, rank.gpu) for rank in plan.trainer_ranks}
    for engine in plan.engines:
        slots |= {(node, gpu) for node, gpus in zip(engine.nodes, engine.gpus, strict=True) for gpu in gpus}
    tokens = sum(len(sample.prompt_ids) + len(sample.response_ids) for sample in rollout.samples)
    if seconds <= 0 or not slots:
        return {}
    return {"perf/tokens_per_gpu_per_s": tokens / seconds / len(slots)}
