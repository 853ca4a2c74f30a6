"""Time before the allocation's end at which training is asked to save: from the plan, then from measured saves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from vime.run.metrics import read_metrics
from vime.run.plan import Plan

RECENT_STEPS = 20
MARGIN_S = 60.0
"""Margin for stopping the stages and for delays never seen before."""
SLOWER = 1.5
"""Factor over the slowest save seen so far: the file system is shared."""
LOOK_AGAIN_S = 60.0
EARLY_S = 90.0
"""Slurm signals up to a minute early, and checks time limits every half minute."""
_STEP = ("perf/generate_time", "perf/train_time", "perf/sync_time")


def measured_lead_s(steps: Mapping[int, Mapping[str, float]]) -> float | None:
    """Seconds from the request for a checkpoint to its end: the current rollout, then the save.

    `steps` are metrics by rollout, oldest first. None before the first measured save.
    """
    recent = list(steps.values())[-RECENT_STEPS:]
    saves = [values["perf/save_time"] for values in steps.values() if "perf/save_time" in values][-RECENT_STEPS:]
    if not saves:
        return None
    longest = max(sum(values.get(name) or 0.0 for name in _STEP) for values in recent)
    return longest + SLOWER * max(saves) + MARGIN_S


def lead_s(plan: Plan) -> float:
    """Lead from this run's saves, or the plan's before the first one; at most half of the time limit."""
    measured = measured_lead_s(read_metrics(Path(plan.run_dir)))
    if measured is None:
        return float(plan.signal_lead_s)
    # A longer lead would leave no time to train.
    return min(measured, plan.cluster.time_limit_minutes * 30.0)


class Clock(Protocol):
    """Part of a runner that knows the allocation's end."""

    def end_time(self) -> float | None: ...


class TimeLeft:
    """The allocation's real end, and the time at which a checkpoint must be requested."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self._plan, self._clock = plan, clock
        self._looked, self.end, self.lead_s = float("-inf"), None, float(plan.signal_lead_s)

    def look(self) -> float:
        """Query the end, which a person or Slurm may have moved; return the seconds left."""
        self._looked = time.monotonic()
        # While Slurm's controller is away, its last answer holds.
        self.end = self._clock.end_time() or self.end
        self.lead_s = lead_s(self._plan)
        return self.left_s

    @property
    def left_s(self) -> float:
        """Seconds left; infinite without a known end."""
        return float("inf") if self.end is None else self.end - time.time()

    def is_due(self) -> bool:
        """True if a checkpoint must be requested now. Cheap: queries once a minute, and before returning True."""
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self.look()
        return self.left_s <= self.lead_s and self.look() <= self.lead_s

    def ends_soon(self) -> bool:
        """True if Slurm's warning announces the end of the allocation."""
        return self.look() <= max(self._plan.signal_lead_s, self.lead_s) + EARLY_S
