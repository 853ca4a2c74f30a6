"""How long before the allocation's end training is asked to save: from the plan, then from what saving has taken."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from vime.run.metrics import read_metrics
from vime.run.plan import Plan

RECENT_STEPS = 20
MARGIN_S = 60.0
"""For stopping the stages and for what is slower than ever."""
SLOWER = 1.5
"""A save may take so much longer than the slowest that was seen: the file system is shared."""
LOOK_AGAIN_S = 60.0
EARLY_S = 90.0
"""Slurm sends the signal up to a minute before it is due, and looks at time limits every half minute."""
_STEP = ("perf/generate_time", "perf/train_time", "perf/sync_time")


def measured_lead_s(steps: Mapping[int, Mapping[str, float]]) -> float | None:
    """Seconds from asking for a checkpoint to its end: the rollout that is under way, then the save.

    `steps` are metrics by rollout, oldest first. None while no save has been measured.
    """
    recent = list(steps.values())[-RECENT_STEPS:]
    saves = [values["perf/save_time"] for values in steps.values() if "perf/save_time" in values][-RECENT_STEPS:]
    if not saves:
        return None
    longest = max(sum(values.get(name) or 0.0 for name in _STEP) for values in recent)
    return longest + SLOWER * max(saves) + MARGIN_S


def lead_s(plan: Plan) -> float:
    """The plan's lead, or that from saves of this run, once there are some; at most half of the time limit."""
    measured = measured_lead_s(read_metrics(Path(plan.run_dir)))
    if measured is None:
        return float(plan.signal_lead_s)
    # More would leave nothing to train in.
    return min(measured, plan.cluster.time_limit_minutes * 30.0)


class Clock(Protocol):
    """The part of a runner that knows when the allocation ends."""

    def end_time(self) -> float | None: ...


class TimeLeft:
    """The allocation's real end, and when training has to be asked for its checkpoint."""

    def __init__(self, plan: Plan, clock: Clock) -> None:
        self._plan, self._clock = plan, clock
        self._looked, self.end, self.lead_s = float("-inf"), None, float(plan.signal_lead_s)

    def look(self) -> float:
        """Asks for the end, which a person or Slurm may have moved; the seconds left."""
        self._looked = time.monotonic()
        # While Slurm's controller is away, what it said last holds.
        self.end = self._clock.end_time() or self.end
        self.lead_s = lead_s(self._plan)
        return self.left_s

    @property
    def left_s(self) -> float:
        """Infinite where there is no end, or none is known."""
        return float("inf") if self.end is None else self.end - time.time()

    def is_due(self) -> bool:
        """Whether a checkpoint has to be asked for now. Cheap: asks anew once a minute, and before it says yes."""
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self.look()
        return self.left_s <= self.lead_s and self.look() <= self.lead_s

    def ends_soon(self) -> bool:
        """Whether Slurm's warning is about the end of the allocation."""
        return self.look() <= max(self._plan.signal_lead_s, self.lead_s) + EARLY_S
