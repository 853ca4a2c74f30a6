"""Servers of the teacher: started beside the engines, restarted where one ends, stopped with the run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

from vime.errors import Cause, VimeError
from vime.rollout.client import EngineError
from vime.rollout.teacher import TeacherFailed
from vime.run.plan import Plan


class Servers(Protocol):
    """Server processes of the teacher's engines (`vime.train.actors.EngineGroup`)."""

    async def restart(self, engines: Sequence[int], *, deadline_s: float) -> None: ...
    async def exited(self) -> list[tuple[int, str]]: ...


class TeacherKeeper:
    """Restarts engines of the teacher whose processes ended, each at most `--max-engine-restarts` times."""

    def __init__(
        self,
        plan: Plan,
        servers: Servers,
        *,
        deadline_s: float,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        assert plan.teacher is not None
        self._teacher, self._servers, self._deadline_s, self._say = plan.teacher, servers, deadline_s, say
        self._limit = plan.recipe.engine.max_engine_restarts
        self._logs = f"{plan.run_dir}/logs/engines"
        self._restarts: Counter[int] = Counter()
        self._one_at_a_time = asyncio.Lock()

    async def recover(self, place: int, error: EngineError) -> bool:
        """Restart the engine at this place of the plan's teacher if its process ended; whether it did.

        Raises TeacherFailed after too many restarts.
        """
        async with self._one_at_a_time:
            ends = dict(await self._servers.exited())
            if place not in ends:
                return False
            number, how = self._teacher.engines[place].index, ends[place]
            while True:
                self._restarts[place] += 1
                count = self._restarts[place]
                if count > self._limit:
                    raise TeacherFailed(
                        f"engine {number} of the teacher {self._teacher.path} failed {count} times, and "
                        f"--max-engine-restarts is {self._limit}: {how} ({error}); its log is "
                        f"{self._logs}/engine-{number}-*.log",
                        Cause.CRASH,
                    ) from error
                self._say(f"engine {number} of the teacher {how}: restarting it, {count} of {self._limit} times")
                try:
                    await self._servers.restart([place], deadline_s=self._deadline_s)
                except VimeError as failure:
                    how = str(failure)
                else:
                    return True
