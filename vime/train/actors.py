"""The Ray actors of a run: one a Megatron rank, one an engine's node. Torch loads after the process is set up."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from vime.errors import DeadlineExceeded
from vime.rollout.engine import EngineServer
from vime.run.cores import set_aside
from vime.run.devices import VISIBLE, device_variables
from vime.run.environment import resolve
from vime.run.folder import read_binding, read_plan
from vime.run.owner import require_owner
from vime.run.plan import Binding, EnginePlan, Plan
from vime.run.profiles import nsys_environment
from vime.run.tokens import API_KEY, GROUP_KEY, read_token
from vime.sync.ranks import ResidenceMethods, SourceMethods, WorkerMethods, address
from vime.system.progress import Progress
from vime.train.former import Former, end_former
from vime.train.placement import Slot, pinned, verify_gpu, verify_here
from vime.train.pulse import Heart

_PUBLISHING = {("worker", name) for name in ("save", "poll_save", "finish_save")}
POLL_SECONDS = 60.0
"""Longest wait for an actor that runs to say how its server is."""
LOOK_SECONDS = 300.0
"""The same for one that may have to start first, beside all others."""
P = ParamSpec("P")
R = TypeVar("R")


def threads_per_rank(plan: Plan, node: int, cores: int) -> int:
    """CPU threads of one trainer rank: the cores, without those of programs, divided by the ranks on the node, or fewer
    if so planned."""
    ranks = sum(rank.node == node for rank in plan.trainer_ranks)
    fair = max(1, (cores - set_aside(plan.recipe.agent, cores)) // max(1, ranks))
    return min(plan.recipe.resources.num_cpus_per_rank or fair, fair)


class RankActor:
    """One Megatron rank: sets GPU and threads from the plan before torch loads; TrainWorker does the work."""

    def __init__(self, run_dir: str, rank: int, former: Former = ()) -> None:
        plan, binding = read_plan(run_dir), read_binding(run_dir)
        self._run_dir, self._binding = run_dir, binding
        place = plan.trainer_ranks[rank]
        self._name = f"rank {rank} on node {place.node}"
        verify_here(binding, place.node, f"trainer rank {rank}")
        end_former(former, binding.nodes[place.node].address)
        # Ray sets one thread for an actor with a fraction of a CPU; CPU Adam runs at the speed of its threads.
        threads = threads_per_rank(plan, place.node, len(os.sched_getaffinity(0)))
        os.environ.update(device_variables([place.gpu], os.environ.get(VISIBLE)))
        os.environ.update(OMP_NUM_THREADS=str(threads))
        given = {name: value for name, value in plan.recipe.misc.env.items() if name not in os.environ}
        os.environ.update(resolve(given, os.environ))
        import torch

        torch.set_num_threads(threads)
        if plan.recipe.resources.device == "gpu":
            verify_gpu(torch.cuda.device_count(), place.gpu, f"trainer rank {rank}")
        from vime.megatron.worker import TrainWorker

        self._rank, self._progress = rank, Progress()
        key = read_token(run_dir, GROUP_KEY).encode()
        self._worker = TrainWorker(plan, rank, place.node, key=key, progress=self._progress)

    def __repr__(self) -> str:
        """Prefix that Ray writes before each line of this actor in the driver's log; vime.logs finds ranks by it."""
        return self._name

    def ask(self, part: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the worker or of one of its parts (`vime.sync.ranks`)."""
        if (part, method) in _PUBLISHING:
            require_owner(self._run_dir, self._binding.job_id, self._binding.restart)
        owner: WorkerMethods | ResidenceMethods | SourceMethods = self._worker
        if part != "worker":
            owner = self._worker.residence if part == "residence" else self._worker.weights
        from vime.megatron.profiling import memory_snapshot

        with self._progress.during(method), memory_snapshot(self._run_dir, self._rank):
            return getattr(owner, method)(*args, **kwargs)

    def beat(self, place: tuple[str, int]) -> None:
        """Give signs of life to the driver, at this address and port, from now on."""
        Heart(self._rank, self._progress, place, read_token(self._run_dir, GROUP_KEY).encode())


class EngineActor:
    """One engine's server process on one of its nodes. It outlives the driver, for the next one of a kept cluster."""

    def __init__(self, run_dir: str, engine: int, position: int) -> None:
        self._run_dir, self._engine, self._position = run_dir, engine, position
        self._plan = read_plan(run_dir)
        self._server: EngineServer | None = None

    def serves(self, binding: Binding) -> str | None:
        """Address of the server if it runs with the very command that this binding gives it; else None."""
        server = self._server
        if server is None or server.pid is None or server.poll() is not None:
            return None
        return server.command.url if server.command == self._made(binding).command else None

    def start(self, binding: Binding) -> None:
        verify_here(binding, self._plan.servers[self._engine].nodes[self._position], f"engine {self._engine}")
        self._server = self._made(binding)
        self._server.start()

    def wait_ready(self, deadline_s: float) -> str:
        assert self._server is not None
        return self._server.wait_ready(deadline_s)

    def poll(self) -> str | None:
        """How the server's process ended; None while it runs, and where it was not started."""
        server = self._server
        if server is None or server.pid is None or (code := server.poll()) is None:
            return None
        return f"exited with {code}: {server.last_words()}"

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _made(self, binding: Binding) -> EngineServer:
        return EngineServer(self._plan, binding, self._engine, self._position, read_token(self._run_dir, API_KEY))


class TrainerGroup:
    """All ranks of the trainer; a call goes to every rank at the same time and ends at the first error.

    `former`: processes of ranks that an earlier driver left, which are over before a rank takes anything.
    """

    def __init__(self, plan: Plan, group: Any, former: Former = ()) -> None:
        import ray

        actor = ray.remote(RankActor)
        self.former = former
        self.handles = [
            actor.options(
                name=f"rank-{place.rank}",
                **pinned(group, plan, Slot(place.node, place.gpu)),
                **nsys_environment(plan.recipe, plan.run_dir, place.rank),
            ).remote(plan.run_dir, place.rank, former)
            for place in plan.trainer_ranks
        ]

    async def beat(self, deadline_s: float, place: tuple[str, int]) -> None:
        """Have every rank give signs of life at this address and port; its process is set up then."""
        await _all("trainer start", [h.beat.remote(place) for h in self.handles], deadline_s)

    async def call(
        self, deadline_s: float, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]:
        """Results in rank order. Big arguments belong into the object store first (`ray.put`)."""
        part, name = address(method)
        asked = [h.ask.options(name=f"{part} {name}").remote(part, name, *args, **kwargs) for h in self.handles]
        return await _all(f"trainer {part} {name}", asked, deadline_s)


class EngineGroup:
    """All engines of the policy, or those given, each with an actor on every node it takes; the first one of an engine
    serves. Its methods number them from 0."""

    def __init__(self, plan: Plan, binding: Binding, group: Any, engines: Sequence[EnginePlan] | None = None) -> None:
        self._plan, self._binding, self._group = plan, binding, group
        self._engines = plan.engines if engines is None else engines
        self._actors: list[list[Any]] = [
            [self._actor(number, position) for position in range(len(engine.nodes))]
            for number, engine in enumerate(self._engines)
        ]

        self.found: list[int] = []
        """Engines that an earlier driver left running, in any state (`vime.train.former.settle`)."""

    async def start(self, *, deadline_s: float) -> list[str]:
        """Start every engine that does not run yet; the addresses of all servers, once each has answered a real
        request, except those of `found`."""
        everyone = range(len(self._actors))
        # An actor of a lost node may be found that Ray does not take for dead yet.
        self._actors = await asyncio.gather(*map(self._alive, everyone))
        asked = [[actor.serves.remote(self._binding) for actor in actors] for actors in self._actors]
        serving = await asyncio.gather(*(_all("engine look", answers, LOOK_SECONDS) for answers in asked))
        self.found = [engine for engine in everyone if None not in serving[engine]]
        others = [engine for engine in everyone if engine not in self.found]
        # A part that still runs would not meet the others, or has another command.
        await self._stop(others)
        started = dict(zip(others, await self._start(others, deadline_s), strict=True))
        return [started.get(engine) or serving[engine][0] for engine in everyone]

    async def restart(self, engines: Sequence[int], *, deadline_s: float) -> None:
        """End these engines, whatever state they are in, and restart them; on return each has answered a request."""
        for engine in engines:
            self._actors[engine] = await self._alive(engine)
        await self._stop(engines)
        await self._start(engines, deadline_s)

    async def exited(self) -> list[tuple[int, str]]:
        """Engines of which a server process, or the actor that holds it, has ended, and how."""
        from ray.exceptions import RayActorError

        found: list[tuple[int, str]] = []
        for index, actors in enumerate(self._actors):
            try:
                ends = await _all(f"engine {index} poll", [actor.poll.remote() for actor in actors], POLL_SECONDS)
            except RayActorError as error:
                found.append((index, f"lost its actor: {str(error).splitlines()[0]}"))
            else:
                found += [(index, end) for end in ends if end is not None][:1]
        return found

    async def stop(self) -> None:
        """End all servers. Those of an actor that died ended with it."""
        from ray.exceptions import RayActorError

        async def end(actor: Any) -> None:
            with contextlib.suppress(RayActorError):
                await actor.stop.remote()

        await _all("engine stop", [end(actor) for actors in self._actors for actor in actors], 60)

    async def _stop(self, engines: Sequence[int]) -> None:
        await _all("engine stop", [actor.stop.remote() for engine in engines for actor in self._actors[engine]], 120)

    async def _start(self, engines: Sequence[int], deadline_s: float) -> list[str]:
        starting = [actor.start.remote(self._binding) for e in engines for actor in self._actors[e]]
        await _all("engine start", starting, deadline_s)
        leaders = [self._actors[engine][0] for engine in engines]
        return await _all("engine ready", [leader.wait_ready.remote(deadline_s) for leader in leaders], deadline_s + 30)

    async def _alive(self, engine: int) -> list[Any]:
        """The engine's actors, a new one for each that has died; its server died with it."""
        from ray.exceptions import RayActorError

        alive = []
        for position, actor in enumerate(self._actors[engine]):
            try:
                await _all(f"engine {engine} poll", [actor.poll.remote()], LOOK_SECONDS)
            except RayActorError:
                alive.append(self._actor(engine, position))
            else:
                alive.append(actor)
        return alive

    def _actor(self, engine: int, position: int) -> Any:
        import ray

        planned = self._engines[engine]
        options = pinned(self._group, self._plan, Slot(planned.nodes[position], planned.gpus[position][0]))
        # Left running by a driver that fails, for the next one.
        options |= {"name": f"engine-{planned.index}-{position}", "lifetime": "detached", "get_if_exists": True}
        return ray.remote(EngineActor).options(**options).remote(self._plan.run_dir, planned.index, position)


async def _all(what: str, references: Sequence[Any], deadline_s: float) -> list[Any]:
    """Results in the order of the references. Raises the first error, or DeadlineExceeded with who did not end."""
    answers = [asyncio.ensure_future(reference) for reference in references]
    try:
        return list(await asyncio.wait_for(asyncio.gather(*answers), deadline_s))
    except TimeoutError:
        late = [str(number) for number, answer in enumerate(answers) if answer.cancelled() or not answer.done()]
        some = f"{', '.join(late[:8])}{', …' if len(late) > 8 else ''}"
        raise DeadlineExceeded(
            f"{what} did not end within {deadline_s:.0f} s on {len(late)} of {len(answers)} actors ({some})"
        ) from None


def master(plan: Plan, binding: Binding) -> tuple[str, int]:
    """Address and port at which the trainer's ranks meet: rank 0's node."""
    return binding.nodes[plan.trainer_ranks[0].node].address, plan.ports.trainer_master + binding.port_offset
