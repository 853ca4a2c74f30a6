"""Stages as processes of this machine (`--cluster local`): the tasks that Slurm would start."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence

from vime.errors import Cause
from vime.launch.steps import AllocatedNode, Step, launch, log_size, places_text, signal_process
from vime.run.devices import VISIBLE
from vime.run.folder import launcher_log
from vime.run.plan import Plan, Stage
from vime.run.variables import JOB, LOCAL_PLACE, LOCAL_RANK, PLACES
from vime.system import processes


class LocalRunner:
    """Runner whose logical nodes are all this machine."""

    def __init__(self, plan: Plan) -> None:
        self.restart, self.can_requeue = 0, False
        self.environment: dict[str, str] = {}
        self._plan = plan
        self.job = f"local-{os.getpid()}"

    def nodes(self) -> tuple[str, ...]:
        return (socket.gethostname(),) * len(self._plan.nodes)

    def start(self, stage: Stage, places: tuple[AllocatedNode, ...]) -> Step:
        log = launcher_log(self._plan.run_dir, stage.name)
        offset = log_size(log)
        command = (sys.executable, "-m", "vime.node.task", "--run", self._plan.run_dir, "--stage", stage.name)
        processes = []
        for place in range(len(places)):
            for rank in range(stage.tasks_per_node):
                env = {**os.environ, **self.environment, PLACES: places_text(places), JOB: self.job}
                env |= {LOCAL_PLACE: str(place), LOCAL_RANK: str(rank)}
                if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
                    env[VISIBLE] = visible
                processes.append(launch(command, env, self._plan.run_dir, stage.name))
        return Step(stage, places, processes, log, offset)

    def stop(self, step: Step, grace_s: float) -> None:
        for process in step.processes:
            signal_process(process, signal.SIGTERM)
        if not step.wait(grace_s):
            for process in step.processes:
                processes.kill_tree(process.pid, signal.SIGKILL)
                signal_process(process, signal.SIGKILL)
            step.wait(10.0)
        step.close()

    def end_time(self) -> float | None:
        return None

    def memory_limits(self) -> dict[str, int]:
        return {}

    def switches(self) -> dict[str, str]:
        return {}

    def why_ended(self) -> Cause:
        return Cause.CANCELLED

    def why_lost(self, job: str, restart: int) -> Cause:
        return Cause.CODE_ERROR

    def runs(self, job: str, restart: int) -> bool | None:
        return None

    def lost_nodes(self) -> dict[str, str]:
        return {}

    def exclude(self, nodes: Sequence[str]) -> None:
        raise NotImplementedError("a local run has one node")

    def requeue(self) -> None:
        raise NotImplementedError("a local run is started again by hand")

    def show(self, text: str) -> None:
        """Does nothing: there is no queue."""
