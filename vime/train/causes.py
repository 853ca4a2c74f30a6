"""Why training ended: decided from Ray's facts about nodes and actors, then from an error's class and text."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vime.errors import Cause, VimeError, is_storage_error
from vime.node.ray_node import live_addresses
from vime.node.ray_process import gcs_address
from vime.run.last_words import cause_of_text, telling_line
from vime.run.plan import Binding, BoundNode, Plan
from vime.train.pulse import RankStuck

POLL_S = 3.0
ASKED_S = 15.0
"""Longest wait of a failed driver for Ray to name the node or actor that ended."""
CONNECT_S = 3.0
RANK_NAME = re.compile(r"rank-(\d+)")
_CONSEQUENCE = re.compile(r"actor|connection|engine \d+|unreachable|timed out|did not end within", re.IGNORECASE)


class NodeLost(VimeError):
    """A node of the run left Ray's cluster while training needed it."""

    cause = Cause.NODE_FAILURE

    def __init__(self, node: BoundNode, how: str) -> None:
        super().__init__(f"node {node.index} ({node.host}) was lost: {how}")
        self.node = node.index


@dataclass(frozen=True)
class DeadActor:
    """An actor that is dead according to Ray although nobody ended it."""

    name: str
    """`rank 1`, or `EngineActor` for one without a name."""
    node: int | None
    """Number of the logical node."""
    rank: int | None
    reason: str
    """Ray's reason, in one line."""
    out_of_memory: bool = False


@dataclass(frozen=True)
class RayFacts:
    """Ray's view of a run that failed."""

    lost: dict[int, str] = field(default_factory=dict)
    """Evidence of each lost logical node, by its number."""
    dead: tuple[DeadActor, ...] = ()


@dataclass(frozen=True)
class Account:
    """The driver's account of its end; sent to the controller as the report `failure`."""

    cause: Cause
    text: str
    """One line."""
    nodes: tuple[int, ...] = ()
    """Logical nodes at fault."""
    rank: int | None = None
    """Trainer rank at fault."""

    def as_data(self) -> dict[str, Any]:
        return asdict(self) | {"cause": self.cause.name, "nodes": list(self.nodes)}


def explain(error: BaseException, facts: RayFacts) -> Account:
    """Account of an error, given Ray's facts. Pure.

    A lost node takes precedence, then a rank that hangs, then a dead actor, unless the error has a cause that no
    death explains.
    """
    found = leaves(error)
    lost = {leaf.node: str(leaf) for leaf in found if isinstance(leaf, NodeLost)}
    lost |= {node: how for node, how in facts.lost.items() if node not in lost}
    if lost:
        return Account(Cause.NODE_FAILURE, "; ".join(lost[node] for node in sorted(lost)), tuple(sorted(lost)))
    for leaf in found:
        if isinstance(leaf, RankStuck):
            return Account(leaf.cause, str(leaf), () if leaf.node is None else (leaf.node,), leaf.rank)
    leaf = min(found, key=_weight)
    cause, text = cause_of(leaf), line_of(leaf)
    if facts.dead and _is_consequence(leaf):
        dead = min(facts.dead, key=lambda actor: (not actor.out_of_memory, actor.rank is None))
        cause = Cause.OUT_OF_MEMORY if dead.out_of_memory else Cause.CRASH
        where = () if dead.node is None else (dead.node,)
        return Account(cause, f"{dead.name} died: {dead.reason}", where, dead.rank)
    return Account(cause, text)


def leaves(error: BaseException) -> list[BaseException]:
    """Leaf errors: those inside exception groups, Ray's wrappers and chains of `raise … from`, in that order."""
    return list(_leaves(error))


def _leaves(error: BaseException) -> Iterator[BaseException]:
    from ray.exceptions import RayTaskError

    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    # Before VimeError: Ray raises a class that is both, whose `cause` is the original error.
    elif isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        yield from _leaves(error.cause)
    else:
        yield error
        if error.__cause__ is not None:
            yield from _leaves(error.__cause__)


def cause_of(error: BaseException) -> Cause:
    """Cause of one error, by its class, then by its text."""
    from ray import exceptions

    if isinstance(error, (BaseExceptionGroup, exceptions.RayTaskError)):
        inner = leaves(error)
        if inner != [error]:
            return cause_of(min(inner, key=_weight))
    elif isinstance(error, VimeError):
        return error.cause
    if is_storage_error(error):
        return Cause.STORAGE
    if isinstance(error, (exceptions.OutOfMemoryError, MemoryError)):
        return Cause.OUT_OF_MEMORY
    if isinstance(error, exceptions.NodeDiedError):
        return Cause.NODE_FAILURE
    text = str(error)
    if isinstance(error, exceptions.RayActorError) and not error.actor_init_failed:
        return Cause.NODE_FAILURE if "node has died" in text else Cause.CRASH
    return cause_of_text([f"{type(error).__name__}: {line}" for line in text.splitlines()]) or Cause.CODE_ERROR


def line_of(error: BaseException) -> str:
    """One-line text of the error, or its class if it has none."""
    from ray.exceptions import RayActorError, RayTaskError

    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if isinstance(error, RayActorError) and not error.actor_init_failed:
        return one_line(str(error))
    if isinstance(error, (RayTaskError, RayActorError)):
        return telling_line(lines)
    line = lines[0].strip() if len(lines) == 1 else telling_line(lines)
    return line if isinstance(error, VimeError) else f"{type(error).__name__}: {line}"


def one_line(reason: str) -> str:
    """Ray's message about a death, without its lists of fields and of common causes."""
    words = [line.strip() for line in reason.splitlines() if line.strip() and not line.startswith("\t")]
    text = " ".join(words).removeprefix("The actor died unexpectedly before finishing this task. ")
    _, mark, detail = text.partition("Worker exit detail: ")
    text = (detail if mark else text).partition(" Some common causes")[0].partition(" There are some potential")[0]
    return text.replace("The actor never ran - it was cancelled before it started running.", "").strip()[:300]


def _weight(error: BaseException) -> int:
    """Sort key: higher for an error that says less than others of the same failure."""
    from ray.exceptions import RayActorError

    if isinstance(error, asyncio.CancelledError):
        return 3
    if isinstance(error, RayActorError):
        return 1
    return 2 if cause_of_text([f"{type(error).__name__}: {error}"]) is Cause.CRASH else 0


def _is_consequence(error: BaseException) -> bool:
    """True if the death of an actor may have led to this error."""
    if isinstance(error, RankStuck):
        return False
    if cause_of(error) in (Cause.CRASH, Cause.NODE_FAILURE, Cause.DEADLINE):
        return True
    return isinstance(error, VimeError) and _CONSEQUENCE.search(str(error)) is not None


# -- asking Ray --


async def watch_nodes(plan: Plan, binding: Binding) -> None:
    """Raise NodeLost when a node of the run leaves Ray's cluster; never returns.

    A silent GCS proves nothing and is ignored: the controller notices the end of the head.
    """
    address, seen = gcs_address(plan, binding), set[str]()
    while True:
        await asyncio.sleep(POLL_S)
        try:
            live = await asyncio.to_thread(live_addresses, address)
        except Exception:  # noqa: BLE001, S112 -- the GCS client's errors have no common base
            continue
        for node in binding.nodes:
            if node.address in seen and node.address not in live:
                raise NodeLost(node, "Ray's health check failed, or its raylet ended")
        seen |= live


async def ray_facts(plan: Plan, binding: Binding, error: BaseException, since: float) -> RayFacts:
    """Dead nodes, and actors that died after the Unix time `since`: Ray also remembers those of earlier drivers.

    If the error mentions a death, wait until Ray knows of it, for at most 15 s."""
    deadline = time.monotonic() + (ASKED_S if any(map(_is_consequence, leaves(error))) else 0.0)
    while True:
        lost = await lost_nodes(plan, binding)
        dead = await asyncio.to_thread(_dead_actors, binding, since)
        if lost or dead or time.monotonic() >= deadline:
            return RayFacts(lost, tuple(dead))
        await asyncio.sleep(1.0)


async def lost_nodes(plan: Plan, binding: Binding) -> dict[int, str]:
    """Logical nodes whose raylet refuses connections, each with the error."""
    port = plan.ports.node_manager + binding.port_offset
    answers = await asyncio.gather(*(_refusal(node.address, port) for node in binding.nodes))
    return {
        node.index: f"node {node.index} ({node.host}) was lost: its raylet does not answer ({how})"
        for node, how in zip(binding.nodes, answers, strict=True)
        if how is not None
    }


async def _refusal(address: str, port: int) -> str | None:
    """Reason for which a port refuses a connection; None if it accepts."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address, port), CONNECT_S)
    except TimeoutError:
        return f"no answer within {CONNECT_S:.0f} s"
    except OSError as error:
        return error.strerror or type(error).__name__
    writer.close()
    return None


def _dead_actors(binding: Binding, since: float) -> list[DeadActor]:
    """Actors of the run that ended without a request after a Unix time."""
    from ray._private import state
    from ray.core.generated.common_pb2 import ActorDiedErrorContext as Context

    try:
        actors: Sequence[dict[str, Any]] = list(state.actors().values())
    except Exception:  # noqa: BLE001 -- the GCS itself may have failed; then no actor is known to be dead
        return []
    intended = (Context.OWNER_DIED, Context.RAY_KILL, Context.OUT_OF_SCOPE, Context.REF_DELETED)
    by_address = {node.address: node.index for node in binding.nodes}
    found = []
    for actor in actors:
        death = actor["DeathCause"]
        context = death.actor_died_error_context
        if actor["State"] != "DEAD" or not (context.error_message or death.HasField("oom_context")):
            continue
        if actor["EndTime"] < 1000 * since:
            continue
        out_of_memory = death.HasField("oom_context")
        reason = death.oom_context.error_message if out_of_memory else context.error_message
        if not out_of_memory and context.reason in intended:
            continue
        match = RANK_NAME.fullmatch(actor["Name"])
        rank = int(match[1]) if match else None
        name = f"rank {rank}" if rank is not None else (actor["Name"] or actor["ActorClassName"])
        node = by_address.get(actor["Address"]["IPAddress"])
        found.append(DeadActor(name, node, rank, one_line(reason), out_of_memory))
    return found
