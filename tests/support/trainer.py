"""A trainer of several processes for tests: each holds a rank's shards and answers a session's calls."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from tests.support import patience
from tests.support.small_models import shards, trained
from vime.errors import DeadlineExceeded, VimeError
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.run.plan import EnginePlan
from vime.sync.ranks import address
from vime.sync.receivers import receivers_of
from vime.sync.schedule import Schedule, make_schedule
from vime.sync.source import WeightSource


@dataclass(frozen=True)
class Held:
    """Weights of a trainer, and the engines that it gives it to."""

    hf: dict[str, Any]
    seed: int
    """Of the weights."""
    engines: tuple[EnginePlan, ...]
    run: str
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    ranks_per_node: int = 8
    buffer: int = 400_000
    draft: bool = False
    gpus: tuple[int, ...] | None = None
    """GPU of each rank; none: all are on processors."""

    def schedule(self) -> Schedule:
        config = ModelConfig.from_hf(self.hf)
        nodes = [rank // self.ranks_per_node for rank in range(self.layout.world_size)]
        receivers = receivers_of(config, nodes, self.engines, gpus=self.gpus and self.gpus[: len(nodes)])
        options = {"draft": self.draft, "mtp_trained": True}
        return make_schedule(config, self.layout, nodes, receivers, self.buffer, **options)


class Trainer:
    """Processes for up to eight ranks; `hold` gives them other weights and another layout. Is a session's `Call`."""

    def __init__(self, folder: Path, processes: int = 8) -> None:
        self._folder, self._count = folder, processes
        self._ranks: list[tuple[Any, Connection]] = []
        self._active = 0
        self._held = 0

    async def __aenter__(self) -> Self:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["vime.sync.source", "vime.fp8.cpu_kernels", "tests.support.small_models"])
        for rank in range(self._count):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))
        return self

    async def __aexit__(self, *_: object) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.join(patience.MOMENT)
            process.kill()

    async def hold(self, held: Held) -> Schedule:
        """Every rank of the layout makes its shards; the schedule of their syncs."""
        self._active = self._count
        self._held += 1
        await self._ask(patience.PROCESS, "hold", held, str(self._folder / f"ranks{self._held}"))
        self._active = held.layout.world_size
        return held.schedule()

    async def __call__(self, deadline_s: float, method: Callable[..., Any], *args: Any) -> list[Any]:
        return await self._ask(deadline_s, address(method)[1], *args)

    async def _ask(self, deadline_s: float, method: str, *args: Any) -> list[Any]:
        active = [connection for _, connection in self._ranks[: self._active]]
        for connection in active:
            connection.send((method, args))
        return await asyncio.to_thread(_collect, active, method, deadline_s)


def _collect(connections: list[Connection], method: str, deadline_s: float) -> list[Any]:
    answers: dict[int, Any] = {}
    end = time.monotonic() + deadline_s
    while len(answers) < len(connections):
        ready = wait([c for i, c in enumerate(connections) if i not in answers], max(0.0, end - time.monotonic()))
        if not ready:
            raise DeadlineExceeded(f"trainer {method} did not end within {deadline_s:.0f} s")
        for connection in ready:
            assert isinstance(connection, Connection)
            failure, answer = connection.recv()
            assert failure is None, failure
            answers[connections.index(connection)] = answer
    return [answers[i] for i in range(len(connections))]


def _rank(rank: int, calls: Connection) -> None:
    torch.set_num_threads(1)
    source: WeightSource | None = None
    while True:
        try:
            method, args = calls.recv()
        except EOFError:
            return
        try:
            if method == "hold":
                source, answer = _hold(rank, *args), None
            else:
                answer = getattr(source, method)(*args)
            calls.send((None, answer))
        except (VimeError, RuntimeError, ValueError, AssertionError, OSError):
            calls.send((f"rank {rank}: {traceback.format_exc()}", None))


def _hold(rank: int, held: Held, store: str) -> WeightSource | None:
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank >= held.layout.world_size:
        return None
    backend = "gloo" if held.gpus is None else "nccl"
    device = torch.device("cpu") if held.gpus is None else torch.device("cuda", held.gpus[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=held.layout.world_size)
    weights = shards(held.hf, trained(held.hf, held.seed), held.layout, rank)
    tensors = {name: tensor.to(device) for name, tensor in weights.items()}
    return WeightSource(tensors, held.schedule(), rank, held.run)
