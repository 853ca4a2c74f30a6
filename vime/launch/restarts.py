"""Consequence of a failed attempt: another one inside the allocation, another start of the job, or the run's end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vime.errors import Cause, VimeError
from vime.launch.allocation import Allocation
from vime.launch.failure import Failure
from vime.launch.signals import Signals
from vime.launch.steps import Runner
from vime.launch.witness import running_stage
from vime.run import history
from vime.run.checkpoints import tracked, tracks_iteration
from vime.run.journal import read_events
from vime.run.plan import Plan, Stage

REQUEUE_PATIENCE_S = 60.0
"""Longest wait of a requeue for Slurm's controller."""
HURRIED_PATIENCE_S = 3.0
"""The same, in seconds, when Slurm is about to kill the job."""
RECOVERABLE = (Cause.NODE_FAILURE, Cause.CRASH, Cause.SPIKE)
"""Causes that the nodes left in the allocation can mend."""
MAY_BE_KEPT = (Cause.CODE_ERROR, Cause.DEADLINE, Cause.OUT_OF_MEMORY, Cause.PREFLIGHT)
"""Causes behind which something that an attempt found in a kept cluster may stand."""
MOST_FRUITLESS = 2
"""Attempts of one start that may be killed from outside without a new checkpoint."""


class Restarts:
    """Attempts of one start of a run. `event` writes to the journal, `say` prints a line."""

    def __init__(
        self,
        plan: Plan,
        runner: Runner,
        allocation: Allocation,
        signals: Signals,
        *,
        event: Callable[..., None],
        say: Callable[[str], None],
    ) -> None:
        self._plan, self._runner, self._allocation, self._signals = plan, runner, allocation, signals
        self._run, self._event, self._say = Path(plan.run_dir), event, say
        self.hurried = False
        """True once Slurm is about to kill the job."""
        self.recovering = False
        """True from a recovery inside the allocation until training runs again."""
        self.kept = False
        """True if the attempt finds the services, and the engines, of the one before."""
        self._attempts = 0
        self._fruitless = 0
        """Attempts in a row before this one that saved no checkpoint."""
        self._first_checkpoint: int | None = None
        """Newest checkpoint when the attempt began."""

    def begin(self) -> dict[str, int]:
        """Begin an attempt; return its number for the journal, nothing for the first."""
        newest = newest_checkpoint(self._plan)
        self._fruitless = self._fruitless + 1 if self._attempts and newest == self._first_checkpoint else 0
        self._first_checkpoint = newest
        self._attempts += 1
        return {"attempt": self._attempts - 1} if self._attempts > 1 else {}

    def started(self, stage: Stage) -> None:
        """Called when a stage has started."""
        self.recovering = self.recovering and not stage.saves_on_request

    def tell_of_lost_start(self) -> None:
        """Record the end of an earlier start that died with its node, or was killed, before it could."""
        events = read_events(self._run)
        start = history.unfinished_start(events)
        if start is None:
            return
        job, restart = str(start.data.get("job")), int(start.data.get("restart", 0))
        cause = self._runner.why_lost(job, restart)
        own = cause is Cause.NODE_FAILURE and not history.was_stopping(events)
        node = self._allocation.name_of(start.data["host"]) if own else None
        text = f"start {restart} of job {job} left no last word: {words(cause)}" + (f" of {node}" if node else "")
        data = {"cause": cause.name, "log_tail": "", "requeued": job == self._runner.job}
        self._event("run-end", text, stage=running_stage(events), node=node, data=data)

    def may_keep(self, failure: Failure) -> bool:
        """True if services that still run may serve another attempt: it is training that failed, and not at once in a
        cluster that was kept before."""
        training = {stage.name for stage in self._plan.stages if stage.saves_on_request}
        able = self._runner.can_requeue and not self.hurried and failure.cause in RECOVERABLE
        return able and failure.stage in training and not self._kept_in_vain

    @property
    def _kept_in_vain(self) -> bool:
        """True if the attempt began in a kept cluster and has saved no checkpoint."""
        return self.kept and newest_checkpoint(self._plan) == self._first_checkpoint

    def recovers(self, failure: Failure, *, serving: bool = False) -> bool:
        """Prepare another attempt on the nodes that the job still has; False if that cannot help.

        `serving`: services of the failed attempt still run. `kept` then says whether the next one uses them.
        """
        in_vain = self._kept_in_vain
        if self.hurried or not self._runner.can_requeue:
            return False
        if failure.cause not in RECOVERABLE and not (in_vain and failure.cause in MAY_BE_KEPT):
            return False
        lost = self._runner.lost_nodes()
        out = set(lost)
        if failure.cause is Cause.NODE_FAILURE:
            if failure.node is None:
                return False
            out.add(self._allocation.name_of(failure.node))
        if why := ("" if in_vain else self._recurs(failure)) or self._allocation.lacks_without(out):
            self._say(f"no recovery inside the allocation: {why}")
            return False
        # A node that is left out but answers would go on offering its place to Ray.
        self.kept = serving and out <= set(lost) and not any(map(self._allocation.is_head, out))
        left = self._allocation.renew(out) if self.kept else self._allocation.leave_out(out)
        self._last_word(failure, f"recovery on the {left} nodes left")
        gone = f" without {', '.join(sorted(out))}" if out else ""
        how = "train again in the cluster that runs" if self.kept else "start again in this allocation"
        data = {"left_out": sorted(out), "nodes": left, "kept": self.kept}
        self._event("recovery", f"{how}{gone}", data=data)
        self.recovering = True
        return True

    def finish(self, failure: Failure) -> None:
        """Write the failure's last word, after requesting another start where that can help."""
        again = self._requeue(failure)
        if again and failure.cause is Cause.NODE_FAILURE and failure.node is not None:
            self._exclude(self._allocation.name_of(failure.node))
        self._last_word(failure, f"requeued {again}" if again else "")

    def _last_word(self, failure: Failure, follows: str) -> None:
        """Write the end of an attempt; `follows` says which start comes next, empty if none does."""
        self._event(
            "run-end",
            failure.text + (f"; {follows}" if follows else ""),
            stage=failure.stage,
            node=None if failure.node is None else self._allocation.name_of(failure.node),
            rank=failure.rank,
            data={"cause": failure.cause.name, "log_tail": "\n".join(failure.tail), "requeued": bool(follows)},
        )

    def _requeue(self, failure: Failure) -> str:
        """Request another start where that can help; return who does it, empty if nobody."""
        cause = failure.cause
        # Whatever ends a recovery before training runs again may be the fault's aftermath on these nodes.
        mends = cause.requeue_mends or (self.recovering and cause is not Cause.CANCELLED)
        if not (mends and self._runner.can_requeue):
            return ""
        if self.hurried:
            # Slurm ends this start itself, and decides whether the job starts again.
            return "by Slurm" if cause in (Cause.PREEMPTED, Cause.NODE_FAILURE) else ""
        if why := self._no_more_starts(failure):
            self._say(f"not requeued: {why}")
            return ""
        if not self._insist("requeue", self._runner.requeue, REQUEUE_PATIENCE_S):
            return ""
        self._event("requeue", f"start {self._runner.restart + 1} follows: {words(cause)}")
        return "by vime"

    def _no_more_starts(self, failure: Failure) -> str:
        """Reason that forbids another start; empty if one may follow."""
        if self._runner.restart >= self._plan.max_timeouts:
            return f"{self._runner.restart} starts, at most {self._plan.max_timeouts}"
        return "" if self.recovering else self._recurs(failure)

    def _recurs(self, failure: Failure) -> str:
        """Reason why the same failure is likely to come again; empty if there is none."""
        if not failure.cause.may_recur:
            return ""
        saved = newest_checkpoint(self._plan) != self._first_checkpoint
        if not saved and not (failure.from_outside and self._fruitless < MOST_FRUITLESS):
            return f"{words(failure.cause)} without a checkpoint since this start began"
        count = history.crashes(read_events(self._run))
        at_most = f"{count} starts in a row ended like this, at most {history.MOST_CRASHES}"
        return at_most if count >= history.MOST_CRASHES else ""

    def _exclude(self, node: str) -> None:
        """Exclude nodes that failed twice from the waiting job. If Slurm is out of reach, the next start retries."""
        counts = history.node_failures(read_events(self._run), self._allocation.name_of)
        counts[node] += 1
        often = history.failed_too_often(counts)
        if often and self._insist("exclude", lambda: self._runner.exclude(often), HURRIED_PATIENCE_S):
            self._event("exclude", f"the job leaves out {', '.join(often)}: failed twice", data={"nodes": often})

    def _insist(self, what: str, act: Callable[[], None], seconds: float) -> bool:
        """Retry a request to Slurm until it succeeds (True) or `seconds` have passed (False)."""
        deadline = time.monotonic() + (HURRIED_PATIENCE_S if self.hurried else seconds)
        while True:
            try:
                act()
                return True
            except VimeError as error:
                if time.monotonic() > deadline:
                    self._say(f"error: no {what}: {error}")
                    return False
            self._signals.wait([], 1.0)


def newest_checkpoint(plan: Plan) -> int | None:
    """Rollout number of the run's newest checkpoint; None without one."""
    folders = [output.path for stage in plan.stages for output in stage.outputs if output.kind == "run"]
    found = [int(tracked(folder)) for folder in folders if folder and tracks_iteration(folder)]
    return max(found, default=None)


def words(cause: Cause) -> str:
    """A cause in lower case with spaces."""
    return cause.name.lower().replace("_", " ")
