"""Typed signatures, free of torch, of the methods that the driver calls on every trainer rank.

A call names a method of one of these protocols, so the type checker rejects a misspelt method or a wrong argument:
`await call(60.0, SourceMethods.prepare, version)`. The rank's objects implement them:
`vime.megatron.worker.TrainWorker`, its `weights` (`vime.sync.source.WeightSource`) and its `residence`
(`vime.megatron.residence.Residence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar

from vime.samples import Rollout
from vime.sync.parts import FarGroup

P = ParamSpec("P")
R = TypeVar("R")

Part = Literal["weights", "gradients"]
"""Memory of a trainer rank that can move off its GPU."""
Free = tuple[int, int | None, int]
"""Logical node, free bytes of one GPU there (None without GPUs), available bytes of its host."""


@dataclass(frozen=True)
class StartState:
    """State from which training starts or resumes."""

    next_rollout_id: int
    loaded_from: str
    extra: dict[str, Any] = field(default_factory=dict)
    """Driver state passed to `save`; empty at the start of a run."""


class WorkerMethods(Protocol):
    """Training, saving and log-probs of one rank."""

    def setup(self, master_address: str, master_port: int) -> StartState: ...
    def train(self, rollout: Rollout) -> dict[str, float]: ...
    def take_spans(self) -> list[tuple[str, float, float]]: ...
    def log_probs(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]: ...
    def save(self, rollout_id: int, extra: dict[str, Any]) -> str: ...
    def poll_save(self) -> bool: ...
    def finish_save(self) -> None: ...


class ResidenceMethods(Protocol):
    """Moves one rank's memory off its GPU and back, and reports free memory."""

    def leave(self, part: Part) -> None: ...
    def come_back(self, part: Part) -> None: ...
    def free_bytes(self) -> Free: ...


class SourceMethods(Protocol):
    """One rank's side of a weight sync."""

    def listen(self, groups: Sequence[FarGroup]) -> dict[str, int]: ...
    def connect(self, timeout_s: float) -> None: ...
    def prepare(self, version: int) -> int: ...
    def publish(self, bucket: int) -> dict[str, Any]: ...
    def release(self, bucket: int) -> None: ...
    def finish(self) -> None: ...
    def digests(self) -> dict[str, str]: ...


class TrainerCall(Protocol):
    """Calls a method on every trainer rank at the same time; returns results in rank order.

    Raises DeadlineExceeded after `deadline_s` seconds, and the first error of any rank.
    """

    async def __call__(
        self, deadline_s: float, method: Callable[Concatenate[Any, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> list[R]: ...


_PARTS = {WorkerMethods: "worker", ResidenceMethods: "residence", SourceMethods: "weights"}


def address(method: Callable[..., Any]) -> tuple[str, str]:
    """(part, name) of a protocol's method; part is `worker`, `residence` or `weights`."""
    owner, _, name = method.__qualname__.rpartition(".")
    return {protocol.__name__: part for protocol, part in _PARTS.items()}[owner], name
