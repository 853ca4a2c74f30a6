"""After which rollouts a run saves."""

from __future__ import annotations

import time
from collections.abc import Callable

from vime.planning.saving import AUTO, best_interval_seconds, failure_seconds, planned_interval_seconds
from vime.run.plan import Plan
from vime.train.phases import saves_after


class SaveSchedule:
    """Fixed intervals of rollouts, or intervals of time that follow the measured saves of this start."""

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock = plan, clock
        self._auto = plan.recipe.checkpoint.save_interval == AUTO
        self._last = clock()
        self._interval_s = planned_interval_seconds(plan) if self._auto else 0.0

    def due(self, rollout_id: int) -> bool:
        """Whether the run saves after this rollout."""
        by_time = self._auto and self._clock() - self._last >= self._interval_s
        return by_time or saves_after(self._plan.recipe, rollout_id)

    def saved(self, seconds: float) -> None:
        """Take note of a save and of its seconds, from which the next interval follows."""
        self._last = self._clock()
        if self._auto:
            self._interval_s = best_interval_seconds(seconds, failure_seconds(self._plan))
