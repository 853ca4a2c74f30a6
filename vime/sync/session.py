"""The driver's side of a weight sync: pause, buckets, version, cache, resume, with a deadline on every call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from vime.errors import Cause, DeadlineExceeded, VimeError
from vime.run.plan import Binding, EnginePlan, Plan
from vime.sync.parts import RECEIVED, Target
from vime.sync.ranks import SourceMethods, TrainerCall
from vime.sync.schedule import Schedule, far_groups, schedule_of

T = TypeVar("T")
P = ParamSpec("P")
Info = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class UpdateClient(Protocol):
    """Calls of a sync to an engine (`vime.rollout.client.EngineClient`), each with its own deadline."""

    async def pause(self, mode: Any = ...) -> None: ...
    async def resume(self) -> None: ...
    async def init_weight_transfer(self, info: Any) -> None: ...
    async def start_update(self) -> None: ...
    async def start_draft_update(self) -> None: ...
    async def update_weights(self, info: Any) -> None: ...
    async def finish_update(self, version: int) -> None: ...
    async def reset_prefix_cache(self) -> None: ...
    async def checksums(self) -> dict[str, str]: ...
    async def reset_weights(self) -> None: ...


class SyncFailed(VimeError):
    """A sync failed half-way. The engine may hold mixed weights: it must be restarted before it serves again."""

    def __init__(self, text: str, *, engine: int | None, bucket: int | None, cause: Cause) -> None:
        super().__init__(text)
        self.engine = engine
        """The engine at fault; None if the trainer was, in which case no engine may serve."""
        self.bucket = bucket
        self.cause = cause


@dataclass(frozen=True)
class SyncDeadlines:
    """Seconds after which a step of the trainer or an engine counts as failed."""

    prepare: float = 300.0
    bucket: float = 600.0
    digests: float = 3600.0
    engine: float = 900.0
    """One call to an engine; longer than the client's deadlines, whose errors say more."""


class WeightSync:
    """Sends the trainer's weights to the engines at every call of `run`; one call at a time."""

    def __init__(
        self,
        plan: Plan,
        call: TrainerCall,
        clients: Sequence[UpdateClient],
        *,
        binding: Binding | None = None,
        pause_mode: str = "keep",
        deadlines: SyncDeadlines | None = None,
    ) -> None:
        addresses = [node.address for node in binding.nodes] if binding else []
        self._check_every = plan.recipe.engine.check_weight_sync
        self._session = Session(
            schedule_of(plan), plan.engines, call, clients, pause_mode, deadlines or SyncDeadlines(), addresses
        )

    async def run(self, version: int) -> dict[str, float]:
        """Sync once; returns metrics `sync/…`. Raises SyncFailed, and then leaves every engine paused.

        Every `--check-weight-sync` versions the sync is checked: see `Session.run`.
        """
        return await self._session.run(version, check=self._check_every > 0 and version % self._check_every == 0)

    def restarted(self, engine: int, client: UpdateClient) -> None:
        """Record that an engine was restarted: the next `run` connects it and sends it all weights."""
        self._session.restarted(engine, client)


class Session:
    """The sync protocol for one schedule."""

    def __init__(
        self,
        schedule: Schedule,
        engines: Sequence[EnginePlan],
        call: TrainerCall,
        clients: Sequence[UpdateClient],
        pause_mode: str,
        deadlines: SyncDeadlines,
        addresses: Sequence[str] = (),
    ) -> None:
        self.schedule, self.engines, self.call, self.addresses = schedule, engines, call, addresses
        self.clients = list(clients)
        self.pause_mode, self.deadlines = pause_mode, deadlines
        self.connected: set[int] = set()
        self.stale: set[int] = set()
        """Engines that may hold mixed weights since a sync failed."""

    def restarted(self, engine: int, client: UpdateClient) -> None:
        """Record that an engine was restarted: it must be connected and may be loaded."""
        self.clients[engine] = client
        self.connected.discard(engine)
        self.stale.discard(engine)

    async def run(self, version: int, *, check: bool = False) -> dict[str, float]:
        """Sync once; returns metrics.

        `check`: afterwards zero the engines' weights, sync again, and compare checksums before and after and between
        engines. A weight that the stream leaves out, or that an engine uses but does not update, differs. The tensors
        each worker received the second time are compared with the trainer's, gathered and quantised whole.

        Raises SyncFailed, and then refuses to run until every engine is restarted.
        """
        started = time.monotonic()
        if self.stale:
            names = ", ".join(map(str, sorted(self.stale)))
            raise self._failed(f"engine {names} has not been restarted since a sync failed", engine=min(self.stale))
        try:
            metrics = await self._run(version, check)
        except BaseException as error:
            self.connected.clear()
            try:
                await self._trainer(self.deadlines.prepare, None, SourceMethods.finish)
            except VimeError as second:
                error.add_note(f"and the trainer could not free its buffers: {second}")
            raise
        return {**metrics, "sync/time": time.monotonic() - started}

    async def _run(self, version: int, check: bool) -> dict[str, float]:
        counts = await self._trainer(self.deadlines.prepare, None, SourceMethods.prepare, version)
        if set(counts) != {len(self.schedule.buckets)}:
            raise self._failed(f"ranks planned {sorted(set(counts))} buckets, the driver {len(self.schedule.buckets)}")
        # From here to the end, a failure leaves the engines with unknown weights.
        self.stale = set(range(len(self.clients)))
        await self._each(None, "pause", lambda client: client.pause(self.pause_mode))
        paused = time.monotonic()
        await self._connect()
        sent = await self._stream_all(version)
        if check:
            before = await self._checksums()
            await self._each(None, "reset_weights", lambda client: client.reset_weights())
            sent += await self._stream_all(version, check=True)
            after = await self._checksums()
            answers = await self._trainer(self.deadlines.digests, None, SourceMethods.digests)
            self._compare(before, after, {name: value for answer in answers for name, value in answer.items()})
        await self._each(None, "reset_prefix_cache", lambda client: client.reset_prefix_cache())
        await self._trainer(self.deadlines.prepare, None, SourceMethods.finish)
        await self._each(None, "resume", lambda client: client.resume())
        self.stale.clear()
        return {
            "sync/buckets": float(len(self.schedule.buckets)),
            "sync/bytes": float(sent),
            "sync/paused_time": time.monotonic() - paused,
        }

    async def _connect(self) -> None:
        """Connect new engines: to memory shared with the trainer, and on far nodes to process groups."""
        new = sorted(set(range(len(self.clients))) - self.connected)
        groups = {engine: far_groups(self.schedule, self.engines[engine], self.addresses) for engine in new}
        far = [group for mine in groups.values() for group in mine]
        ports: dict[str, int] = {}
        if far:
            for answer in await self._trainer(self.deadlines.prepare, None, SourceMethods.listen, far):
                ports |= answer

        def init(engine: int) -> Awaitable[None]:
            joining = [
                {
                    "address": group.address,
                    "key": group.key,
                    "port": ports[f"{group.receiver}/{engine}"],
                    "first_worker": group.first_worker,
                    "workers": group.workers,
                }
                for group in groups[engine]
            ]
            info = {"groups": joining, "timeout_s": self.deadlines.prepare}
            return self._engine(engine, None, "init", self.clients[engine].init_weight_transfer(info))

        waiting: list[Awaitable[Any]] = [init(engine) for engine in new]
        if far:
            deadline = self.deadlines.prepare
            waiting.append(self._trainer(deadline + 30, None, SourceMethods.connect, deadline))
        await asyncio.gather(*waiting)
        self.connected |= set(new)

    async def _stream_all(self, version: int, check: bool = False) -> int:
        return sum([await self._stream(target, version, check) for target in ("policy", "draft")])

    async def _checksums(self) -> list[dict[str, str]]:
        return await asyncio.gather(
            *(self._engine(engine, None, "checksums", client.checksums()) for engine, client in enumerate(self.clients))
        )

    def _compare(
        self, before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]], trainer: Mapping[str, str]
    ) -> None:
        for engine, (first, last) in enumerate(zip(before, after, strict=True)):
            plan = self.engines[engine]
            sizes = (plan.tensor_parallel_size, plan.data_parallel_size)
            twin = next(
                i for i, e in enumerate(self.engines) if (e.tensor_parallel_size, e.data_parallel_size) == sizes
            )
            second = {name: value for name, value in last.items() if RECEIVED not in name}
            self._same(f"of engine {engine} differ after all weights were sent again", first, second, engine)
            self._same(f"of engine {engine} differ in engine {twin}", first, before[twin], engine)
            for worker, received in received_by_worker(last).items():
                sent = {name: trainer.get(name, "") for name in received}
                self._same(
                    f"that {worker} of engine {engine} received differ from the trainer's", received, sent, engine
                )
            everything = {name for received in received_by_worker(last).values() for name in received}
            missing = sorted(needed_names(self.schedule, plan) - everything)
            if missing:
                text = f"engine {engine} received no {missing[0]} and {len(missing) - 1} other weights"
                raise self._failed(text, engine=engine)

    def _same(self, what: str, first: Mapping[str, str], second: Mapping[str, str], engine: int) -> None:
        wrong = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
        if wrong:
            raise self._failed(f"{len(wrong)} weights {what}, the first is {wrong[0]}", engine=engine)

    async def _stream(self, target: Target, version: int, check: bool) -> int:
        """Update one model of every engine; returns bytes. A bucket is gathered while the one before it is loaded."""
        buckets = [bucket.index for bucket in self.schedule.buckets if bucket.target == target]
        if not buckets:
            return 0
        if target == "policy":
            await self._each(None, "start_update", lambda client: client.start_update())
        else:
            await self._each(None, "start_draft_update", lambda client: client.start_draft_update())
        loading: asyncio.Task[None] | None = None
        sent, before = 0, None
        try:
            for bucket in buckets:
                infos = await self._published(bucket)
                sent += sum(int(info["size"]) for info in infos.values())
                if loading is not None:
                    await loading
                # Start the load first, so that engines work while the trainer releases the previous buffer.
                loading = asyncio.create_task(self._load(bucket, infos, check))
                if before is not None:
                    await self._trainer(self.deadlines.bucket, before, SourceMethods.release, before)
                before = bucket
            assert loading is not None
            assert before is not None
            await loading
            await self._trainer(self.deadlines.bucket, before, SourceMethods.release, before)
        finally:
            if loading is not None and not loading.done():
                loading.cancel()
                await asyncio.gather(loading, return_exceptions=True)
        await self._each(None, "finish_update", lambda client: client.finish_update(version))
        return sent

    async def _published(self, bucket: int) -> dict[int, Mapping[str, Any]]:
        """Publish a bucket; returns its description for each receiver."""
        answers = await self._trainer(self.deadlines.bucket, bucket, SourceMethods.publish, bucket)
        infos = {int(number): info for answer in answers for number, info in answer.items()}
        missing = set(range(len(self.schedule.receivers))) - set(infos)
        if missing:
            raise self._failed(f"no rank published bucket {bucket} for receivers {sorted(missing)}", bucket=bucket)
        return infos

    async def _load(self, bucket: int, infos: Mapping[int, Mapping[str, Any]], check: bool) -> None:
        by_device = {
            (receiver.node, receiver.gpu): {**infos[number], "digest": check}
            for number, receiver in enumerate(self.schedule.receivers)
        }
        await asyncio.gather(
            *(
                self._engine(
                    engine.index, bucket, "update_weights", client.update_weights(worker_infos(engine, by_device))
                )
                for engine, client in zip(self.engines, self.clients, strict=True)
            )
        )

    async def _each(self, bucket: int | None, what: str, call: Callable[[UpdateClient], Awaitable[None]]) -> None:
        """Make the same call to every engine concurrently."""
        await asyncio.gather(
            *(self._engine(engine, bucket, what, call(client)) for engine, client in enumerate(self.clients))
        )

    async def _engine(self, engine: int, bucket: int | None, what: str, call: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(call, self.deadlines.engine)
        except TimeoutError:
            text = f"engine {engine} did not end {what} within {self.deadlines.engine:.0f} s"
            raise self._failed(text, engine=engine, bucket=bucket, cause=Cause.DEADLINE) from None
        except VimeError as error:
            raise self._failed(
                f"engine {engine}: {what}: {error}", engine=engine, bucket=bucket, cause=error.cause
            ) from error

    async def _trainer(
        self,
        deadline_s: float,
        bucket: int | None,
        method: Callable[Concatenate[Any, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[T]:
        """Call every trainer rank; `bucket` is named in the error if the deadline passes."""
        try:
            return await self.call(deadline_s, method, *args, **kwargs)
        except DeadlineExceeded as error:
            raise self._failed(str(error), bucket=bucket, cause=error.cause) from error

    def _failed(
        self, text: str, *, engine: int | None = None, bucket: int | None = None, cause: Cause = Cause.CODE_ERROR
    ) -> SyncFailed:
        at = "" if bucket is None else f" in bucket {bucket} of {len(self.schedule.buckets)}"
        return SyncFailed(
            f"weight sync failed{at}: {text}; engines stay paused, restart them",
            engine=engine,
            bucket=bucket,
            cause=cause,
        )


def worker_infos(engine: EnginePlan, by_device: Mapping[tuple[int, int | None], Mapping[str, Any]]) -> Info:
    """Payload of an engine's update call: one description, or one for each worker in order if they differ."""
    devices = [(node, gpu) for node, gpus in zip(engine.nodes, engine.gpus, strict=True) for gpu in gpus]
    infos = [by_device[device if device in by_device else (device[0], None)] for device in devices]
    return infos[0] if all(info is infos[0] for info in infos) else infos


def received_by_worker(checksums: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Worker (`dp0:pp0:pcp0:tp0`) to HF name to digest of the received tensor, from an engine's checksums."""
    found: dict[str, dict[str, str]] = {}
    for name, value in checksums.items():
        worker, _, tensor = name.rpartition(":")
        if tensor.startswith(RECEIVED):
            found.setdefault(worker, {})[tensor.removeprefix(RECEIVED)] = value
    return found


def needed_names(schedule: Schedule, engine: EnginePlan) -> set[str]:
    """HF names of the tensors sent to an engine's receivers."""
    receivers = [receiver for receiver in schedule.receivers if engine.index in receiver.engines]
    return {
        entry.name
        for bucket in schedule.buckets
        for entry in bucket.entries
        if any(receiver.needs(entry) for receiver in receivers)
    }
