"""Ranks and engines that an earlier driver of the same Ray cluster left: ranks must be over, engines serve on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Collection, Sequence
from typing import Any

from vime.errors import DeadlineExceeded
from vime.rollout.client import EngineClient
from vime.system.processes import started_at

Former = Sequence[tuple[str, int, float]]
"""Address of the node, process id, and a Unix time after the process's start, of each rank of earlier drivers."""
NAMES_SECONDS = 60.0
"""Time for Ray to end the ranks of a driver that has ended."""
GRACE_SECONDS = 5.0
KILL_SECONDS = 10.0
POLL_SECONDS = 0.1
JOIN_SECONDS = 60.0


def former_ranks(actors: Collection[dict[str, Any]], job: str) -> Former:
    """Ranks of other jobs among Ray's records of actors (`ray._private.state.actors`). Pure."""
    return tuple(
        (actor["Address"]["IPAddress"], actor["Pid"], (actor["EndTime"] or actor["StartTime"]) / 1000)
        for actor in actors
        if actor["JobID"] != job and actor["Name"].startswith("rank-") and actor["Pid"]
    )


async def wait_for_names(deadline_s: float = NAMES_SECONDS) -> Former:
    """Wait until Ray has given up the ranks of earlier drivers, whose names the new ones take; their processes.

    Raises DeadlineExceeded with those that are left.
    """
    import ray
    from ray._private import state
    from ray.util import list_named_actors

    deadline = time.monotonic() + deadline_s
    while names := [name for name in await asyncio.to_thread(list_named_actors) if name.startswith("rank-")]:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{', '.join(names)} of an earlier driver did not end within {deadline_s:.0f} s")
        await asyncio.sleep(POLL_SECONDS)
    actors: dict[str, dict[str, Any]] = await asyncio.to_thread(state.actors)
    return former_ranks(actors.values(), ray.get_runtime_context().get_job_id())


def end_former(former: Former, address: str) -> None:
    """Wait until those at this node's address have ended; kill one that is stopped or stuck. What it held of a GPU is
    free afterwards.

    A process that started later has only got the number of one that ended. Raises DeadlineExceeded.
    """
    left = [(pid, by) for where, pid, by in former if where == address and pid != os.getpid()]
    began = time.monotonic()
    while left := [(pid, by) for pid, by in left if (at := started_at(pid)) is not None and at <= by]:
        waited = time.monotonic() - began
        if waited > GRACE_SECONDS + KILL_SECONDS:
            raise DeadlineExceeded(f"process {left[0][0]}, a rank of an earlier driver, outlived its kill")
        if waited > GRACE_SECONDS:
            for pid, _ in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


async def settle(client: EngineClient, *, sleeps: bool, learns: bool = True) -> None:
    """Bring an engine that an earlier driver left, in any state, to that of one that has just started: awake, without
    requests, not paused. `sleeps`: it may be asleep, and waking takes its share of the GPU; `learns`: it gets weights.

    Raises EngineError if it must be started again, as in the middle of an update.
    """
    if sleeps:
        await client.wake_up()
    await client.pause("abort")
    if learns:
        # Without groups this joins nothing; a worker refuses it whose update was left unfinished.
        await client.init_weight_transfer({"groups": [], "timeout_s": JOIN_SECONDS})
    await client.resume()
