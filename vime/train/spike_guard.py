"""Guard against spikes: a rollout that derails training is undone by a resume without its prompts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vime.errors import Cause, VimeError
from vime.observe.spikes import SpikeWatch
from vime.run.left_out import Row, leave_out, set_backs
from vime.run.metrics import read_metrics
from vime.run.plan import Plan


class Spike(VimeError):
    """Training spiked; the run goes back to its newest checkpoint."""

    cause = Cause.SPIKE


class SpikeGuard:
    """Judges each trained rollout before it is saved. `first` is the rollout that this start begins with."""

    def __init__(self, plan: Plan, first: int) -> None:
        options = plan.recipe.optimizer
        self._run_dir, self._limit = plan.run_dir, options.spike_limit
        self._watch = SpikeWatch(options.spike_factor) if options.spike_guard == "rollback" else None
        if self._watch is not None:
            for rollout_id, metrics in sorted(read_metrics(plan.run_dir).items()):
                if rollout_id < first:
                    self._watch.add(metrics)

    def judge(self, rollout_id: int, metrics: Mapping[str, float], rows: Collection[Row]) -> None:
        """Raise Spike, and leave out these prompts from then on, if the rollout's metrics spike.

        After `--spike-limit` set-backs of the run a spike is only printed.
        """
        if self._watch is None or not (why := self._watch.add(metrics)):
            return
        count = len(set_backs(self._run_dir))
        if count >= self._limit:
            print(f"warning: rollout {rollout_id}: {why}; kept, after {count} set-backs (--spike-limit)", flush=True)
            return
        leave_out(self._run_dir, rollout_id, why, rows)
        raise Spike(f"rollout {rollout_id} spiked: {why}; its {len(rows)} prompts are left out from now on")
