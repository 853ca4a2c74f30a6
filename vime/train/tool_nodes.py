"""Programs of the tool `python` on all nodes of a run: one actor a node runs them in its sandbox."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from vime.agents import sandbox
from vime.agents.sandbox import Limits, Outcome
from vime.errors import DeadlineExceeded
from vime.node.ray_process import pin_resource
from vime.run.cores import divide, programs_at_once
from vime.run.folder import read_binding, read_plan
from vime.run.plan import Plan
from vime.train.placement import PIN, verify_here

START_SECONDS = 300.0
GRACE_SECONDS = 20.0
"""Time beyond a program's own within which its node has to answer; then it counts as lost."""
REST_SECONDS = 60.0
"""Time for which a lost node gets no programs, if others are there."""
TRIES = 3
"""Nodes on which a program is started; one that is lost with its node has changed nothing outside its sandbox."""


class SandboxActor:
    """Runs programs on one node, on the cores that are set aside for them."""

    def __init__(self, run_dir: str, node: int) -> None:
        plan = read_plan(run_dir)
        verify_here(read_binding(run_dir), node, "the sandbox")
        here = sorted(os.sched_getaffinity(0))
        cores = divide(plan.recipe.agent, here).programs
        self._places = programs_at_once(plan.recipe.agent, len(here))
        for thread in Path("/proc/self/task").iterdir():  # what programs inherit is the cores of the thread that forks
            os.sched_setaffinity(int(thread.name), cores)

    async def check(self) -> int:
        """Number of programs that may run here at once. Raises BadInput where the sandbox does not work."""
        await sandbox.check()
        return self._places

    async def run(self, source: str, limits: Limits) -> Outcome:
        return await sandbox.run_python(source, limits)


class _Node:
    """One node as the driver knows it."""

    def __init__(self, plan: Plan, node: int) -> None:
        import ray

        options = {"num_cpus": 0, "max_restarts": -1, "resources": {pin_resource(node): PIN}}
        self._actor: Any = ray.remote(SandboxActor).options(**options).remote(plan.run_dir, node)
        self.places, self.running, self.ran, self.rests_until = 1, 0, 0, 0.0

    async def check(self) -> None:
        self.places = await self._actor.check.remote()

    async def run(self, source: str, limits: Limits) -> Outcome | None:
        """The program's outcome; None where its sandbox, the actor or the node is lost."""
        import ray
        from ray.exceptions import RayActorError

        self.running += 1
        call = self._actor.run.remote(source, limits)
        try:
            outcome = await asyncio.wait_for(call, limits.seconds + GRACE_SECONDS)
            if outcome.failure == "lost":  # Ray ends an actor's children before the actor
                self.rests_until = time.monotonic() + REST_SECONDS
                return None
            self.ran += 1
            return outcome
        except RayActorError:
            self.rests_until = time.monotonic() + REST_SECONDS
            return None
        except TimeoutError:
            ray.cancel(call)
            self.rests_until = time.monotonic() + REST_SECONDS
            return None
        except asyncio.CancelledError:
            ray.cancel(call)
            raise
        finally:
            self.running -= 1


class ToolNodes:
    """Programs on all nodes of a plan (`vime.agents.sandbox.Programs`), each on the one with the most room.

    More programs than the nodes have places for wait; of one event loop.
    """

    def __init__(self, plan: Plan) -> None:
        self._nodes = [_Node(plan, node) for node in range(len(plan.nodes))]
        self._room = asyncio.Semaphore(0)
        self._repeated = 0

    async def check(self) -> None:
        """Start the actors and run a first program on each node. Raises BadInput or DeadlineExceeded."""
        try:
            async with asyncio.timeout(START_SECONDS):
                await asyncio.gather(*(node.check() for node in self._nodes))
        except TimeoutError:
            raise DeadlineExceeded(f"the sandboxes of the nodes did not start within {START_SECONDS:.0f} s") from None
        self._room = asyncio.Semaphore(sum(node.places for node in self._nodes))

    async def run(self, source: str, limits: Limits) -> Outcome:
        """A program's outcome, on another node where its own is lost; `lost` if it was each time."""
        async with self._room:
            for attempt in range(TRIES):
                self._repeated += attempt > 0
                outcome = await min(self._nodes, key=_load).run(source, limits)
                if outcome is not None:
                    return outcome
        return Outcome("", "lost")

    def loads(self) -> list[int]:
        """Programs that run on each node."""
        return [node.running for node in self._nodes]

    def take_metrics(self) -> dict[str, float]:
        """Programs since the last call: those that ended, by node, and those begun again because theirs was lost."""
        metrics = {"rollout/programs_repeated": float(self._repeated)}
        self._repeated = 0
        for number, node in enumerate(self._nodes):
            metrics[f"rollout/programs/node{number:02d}"] = float(node.ran)
            node.ran = 0
        return metrics


def _load(node: _Node) -> tuple[bool, float]:
    return node.rests_until > time.monotonic(), node.running / node.places
