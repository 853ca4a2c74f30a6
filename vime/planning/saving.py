"""Time between checkpoints with `--save-interval auto`: from the cost of a save and the rate of failures."""

from __future__ import annotations

import math

from vime.planning.traffic import checkpoint_seconds
from vime.run.plan import Plan

AUTO = "auto"


def failure_seconds(plan: Plan) -> float:
    """Mean seconds between two failures of the run's GPUs, or of its slots on a cluster without GPUs."""
    return plan.cluster.gpu_hours_per_failure * 3600 / sum(node.gpus for node in plan.nodes)


def best_interval_seconds(save_seconds: float, between_failures: float) -> float:
    """Seconds of training between two saves that lose least time to saves and to repeated work.

    `sqrt(2 C M)` for saves of C seconds and M seconds between failures: J. W. Young, A first order approximation to the
    optimum checkpoint interval, 1974. Daly's higher orders differ where C is not small against M, which it is here.
    """
    return math.sqrt(2 * save_seconds * between_failures)


def planned_interval_seconds(plan: Plan) -> float:
    """Interval before the first save is measured, from the plan's estimate of one."""
    return best_interval_seconds(checkpoint_seconds(plan), failure_seconds(plan))
