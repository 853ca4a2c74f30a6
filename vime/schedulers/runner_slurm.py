"""Stages as job steps: one srun per stage, for any number of nodes."""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Sequence

from vime.errors import Cause
from vime.launch.steps import AllocatedNode, Step, launch, log_size, places_text, signal_process
from vime.run.folder import launcher_log
from vime.run.plan import Plan, Stage
from vime.run.variables import HELD, JOB, PLACES
from vime.schedulers import container
from vime.schedulers.srun import srun_argv, step_name, step_python
from vime.slurm import queue as slurm
from vime.slurm.client import SlurmError, step_environment
from vime.slurm.hostlist import expand_hosts
from vime.slurm.reach import unreachable

_MESSAGE = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+?))?(?:,.*)? \*\*\*")
_STATES = {
    "NODE_FAIL": Cause.NODE_FAILURE,
    "PREEMPTED": Cause.PREEMPTED,
    "REQUEUED": Cause.PREEMPTED,
    "TIMEOUT": Cause.TIME_LIMIT,
    "CANCELLED": Cause.CANCELLED,
    "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY,
}
_REASONS = {
    "TIME LIMIT": Cause.TIME_LIMIT,
    "NODE FAILURE": Cause.NODE_FAILURE,
    "PREEMPTION": Cause.PREEMPTED,
    "JOB REQUEUE": Cause.PREEMPTED,
}


def cause_of_message(text: str) -> Cause | None:
    """Why Slurm ends the job, from the line it writes to the job's output just before TERM; None without one.

    The job's state does not show it: while a job ends, it is COMPLETING for any reason.
    """
    found = _MESSAGE.findall(text)
    return _REASONS.get(found[-1], Cause.CANCELLED) if found else None


_COMMENT = "vime: "


def site_comment(comment: str) -> str:
    """Part of a job's comment that is not vime's, for the site's own programs."""
    before, _, after = comment.rpartition(f"; {_COMMENT}")
    if before or after != comment:
        return before
    return "" if comment.startswith(_COMMENT) else comment


def with_comment(site: str, text: str) -> str | None:
    """Job comment with vime's text, which begins with `vime: `; None if the site's part allows no addition."""
    if site.startswith(("{", "[")):
        # JSON, which an addition would make unreadable.
        return None
    return f"{site}; {text}" if site else text


class SlurmRunner:
    """Runner on the batch host, inside the job."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.job = os.environ["SLURM_JOB_ID"]
        self.restart, self.can_requeue = int(os.environ.get("SLURM_RESTART_COUNT", "0")), HELD not in os.environ
        self.environment: dict[str, str] = {}
        self._own_comment: str | None = None
        """Job comment without vime's part; None: not queried yet."""
        self._cpus = slurm.cpus_per_node()
        self._silent: tuple[str, ...] = ()
        """Nodes whose slurmd did not answer the last time."""
        # A requeued job appends to the output of its first start.
        self._output_start = os.fstat(1).st_size

    def nodes(self) -> tuple[str, ...]:
        return expand_hosts(os.environ["SLURM_JOB_NODELIST"])

    def start(self, stage: Stage, places: tuple[AllocatedNode, ...]) -> Step:
        argv = srun_argv(
            stage,
            [place.name for place in places],
            plan=self._plan,
            python=step_python(self._plan.cluster),
            cpus_per_node=self._cpus,
        )
        env = {**step_environment(os.environ), **self.environment, PLACES: places_text(places), JOB: self.job}
        env |= container.environment(self._plan, env)
        log = launcher_log(self._plan.run_dir, stage.name)
        offset = log_size(log)
        process = launch(argv, env, self._plan.run_dir, stage.name)
        return Step(stage, places, [process], log, offset)

    def stop(self, step: Step, grace_s: float) -> None:
        """Signal the step instead of the srun client, which would kill at once."""
        for number, seconds in (("TERM", grace_s), ("KILL", 10.0)):
            if step.wait(0):
                break
            try:
                with slurm.signalling(slurm.step_ids(self.job, step_name(step.stage.name)), number):
                    step.wait(seconds, enough=lambda: self._only_silent(step))
            except SlurmError:
                # The step may have ended before it was found; its srun then ends too.
                step.wait(seconds)
        signal_process(step.processes[0], signal.SIGKILL)
        step.wait(5.0)
        step.close()

    def _only_silent(self, step: Step) -> bool:
        """True if every task of the step has ended but those on nodes that do not answer, for which srun would wait."""
        left = {place.name for place in step.unended_places}
        return bool(left) and left <= set(self._silent)

    def end_time(self) -> float | None:
        state = slurm.job_state(self.job)
        return None if state is None else state.end

    def memory_limits(self) -> dict[str, int]:
        return slurm.job_memory(self.job)

    def switches(self) -> dict[str, str]:
        return slurm.leaf_switches()

    def why_ended(self) -> Cause:
        cause = cause_of_message(self._own_output())
        if cause is not None:
            return cause
        # Only a few seconds lie between TERM and KILL.
        state = slurm.job_state(self.job, seconds=2.0)
        return Cause.PREEMPTED if state is not None and state.restarts > self.restart else Cause.CANCELLED

    def _own_output(self) -> str:
        """Output of this start of the job, including Slurm's own lines about it."""
        if not stat.S_ISREG(os.fstat(1).st_mode):
            return ""
        with open("/proc/self/fd/1", "rb") as output:
            output.seek(self._output_start)
            return output.read().decode(errors="replace")

    def why_lost(self, job: str, restart: int) -> Cause:
        states = slurm.past_states(job)
        return _STATES.get(states[restart], Cause.CODE_ERROR) if restart < len(states) else Cause.CODE_ERROR

    def runs(self, job: str, restart: int) -> bool | None:
        if not job.isdigit():
            return None
        try:
            state = slurm.query_job(job)
        except SlurmError:
            return None
        return state is not None and state.phase == "running" and state.restarts <= restart

    def lost_nodes(self) -> dict[str, str]:
        nodes = os.environ["SLURM_JOB_NODELIST"]
        states = slurm.node_states(nodes, seconds=2.0)
        lost = {name: slurm.loss_text(state) for name, state in states.items() if slurm.is_lost(state)}
        silent = unreachable(nodes, self._silent)
        self._silent = tuple(silent)
        return lost | {name: how for name, how in silent.items() if name not in lost}

    def requeue(self) -> None:
        try:
            slurm.requeue(self.job)
        except SlurmError:
            # Slurm ends this start on the request, at times before scontrol has returned.
            state = slurm.job_state(self.job)
            if state is None or not (state.state == "COMPLETING" or state.phase == "waiting"):
                raise

    def exclude(self, nodes: Sequence[str]) -> None:
        slurm.exclude(self.job, nodes, seconds=2.0)

    def show(self, text: str) -> None:
        if self._plan.cluster.job_comment == "keep":
            return
        if self._own_comment is None:
            job = slurm.query_job(self.job)
            self._own_comment = "" if job is None else site_comment(job.comment)
        if (comment := with_comment(self._own_comment, text)) is not None:
            slurm.set_comment(self.job, comment)
