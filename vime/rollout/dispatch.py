"""Assignment of groups to engines: least loaded first, around engines that fail, hang or restart.

A group takes a seat on one engine and one of its data-parallel ranks, where its samples share the prompt's cached keys
and values. A group waits while every engine has as many requests as its server takes, so that a slow engine gets fewer.

One module since seats, strikes, restarts and deadlines change the same few tables between two awaits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from vime.errors import DeadlineExceeded, VimeError
from vime.rollout.client import EngineAnswer, EngineClient, EngineError, EngineTimeout, Generated, SamplingSettings
from vime.rollout.routes import RoutesAsked

log = logging.getLogger(__name__)

T = TypeVar("T")
Recover = Callable[[int, EngineError], Awaitable[None]]
"""Called with the number of an engine that failed and how; returns once it runs again with the current weights."""

_GENERATED_TOKENS = re.compile(r"^vllm:generation_tokens_total(?:\{[^}]*\})? (\S+)", re.MULTILINE)


class RoundFull(Exception):
    """The round is full: no request is sent any more."""


@dataclass(frozen=True)
class Patience:
    """Limits of retries, and deadlines in seconds."""

    attempts: int = 6
    """Requests for one sample before its failure ends the run."""
    strikes: int = 3
    """Consecutive wrong answers after which an engine is not used until it has recovered."""
    recovery: float = 900.0
    """Time for a failed engine to answer again."""
    stall: float = 300.0
    """Time without a new token, with requests in flight, after which an engine counts as hung."""
    watch: float = 15.0
    """Interval between two checks of the engines' progress."""
    abort: float = 60.0
    """Time for an engine to end all requests after an abort."""


@dataclass(eq=False)
class _Engine:
    index: int
    client: EngineClient
    loads: list[int]
    """Samples seated on each data-parallel rank."""
    up: bool = True
    strikes: int = 0
    calls: set[asyncio.Task[Generated]] = field(default_factory=set)
    failure: EngineError | None = None
    tokens: float | None = None
    """Generated tokens at the last progress."""
    progress_at: float = 0.0
    busy_from: float = 0.0
    busy: float = 0.0
    """Seconds of the round with a request in flight."""

    def call_ended(self, call: asyncio.Task[Generated]) -> None:
        self.calls.discard(call)
        if not self.calls:
            self.busy += time.monotonic() - self.busy_from

    @property
    def load(self) -> int:
        return sum(self.loads)

    @property
    def has_room(self) -> bool:
        return self.up and self.load < self.client.concurrency


@dataclass(eq=False)
class Seat:
    """Engine and data-parallel rank that generate the samples of one group; `left` counts the unfinished ones.

    A sample keeps its place between two turns of a conversation, while a tool works for it.
    """

    left: int
    engine: _Engine | None = None
    rank: int = 0
    moving: asyncio.Lock = field(default_factory=asyncio.Lock)


class _Clock:
    """Runs `expire` after `seconds` of time in which it was not stopped."""

    def __init__(self, seconds: float, expire: Callable[[], None]) -> None:
        self._loop, self._left, self._expire = asyncio.get_running_loop(), seconds, expire
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._left, self._expire)

    def stop(self) -> None:
        if self._timer is not None:
            self._left = max(0.0, self._timer.when() - self._loop.time())
            self._timer.cancel()
            self._timer = None


class Dispatcher:
    """All engines of a run. An async context manager; of one event loop.

    `expected_version` of the weights is set by the round: an engine that restarted with others is not used.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        data_parallel_sizes: Sequence[int] = (),
        *,
        recover: Recover | None = None,
        patience: Patience | None = None,
    ) -> None:
        sizes = data_parallel_sizes or [1] * len(clients)
        self._engines = [_Engine(i, c, [0] * n) for i, (c, n) in enumerate(zip(clients, sizes, strict=True))]
        self._recover, self.patience = recover, patience or Patience()
        self._waiting: deque[tuple[Seat, asyncio.Future[None]]] = deque()
        self._tasks: set[asyncio.Future[None]] = set()
        self._recoveries: set[asyncio.Future[None]] = set()
        self._clocks: set[_Clock] = set()
        self._holds = 0
        self._stopping = False
        self._fatal: VimeError | None = None
        self._began = time.monotonic()
        self.expected_version: int | None = None
        self.retries = 0
        """Requests repeated since the last `take_metrics`."""

    async def __aenter__(self) -> Self:
        self._spawn(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        for task in (*self._tasks, *(call for engine in self._engines for call in engine.calls)):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def time_limit(self, seconds: float) -> AsyncIterator[None]:
        """As `asyncio.timeout`, with a clock that stands still while an engine recovers: that has its own limit.

        Raises TimeoutError, or EngineTimeout with the engines that had requests and made no token for long.
        """
        silent: list[str] = []
        try:
            # Looked at before the round's requests are cancelled, which no engine shows any more afterwards.
            async with self.clock(seconds, at_end=lambda: silent.extend(self._silent())):
                yield
        except TimeoutError:
            if silent:
                raise EngineTimeout(f"no token from {', '.join(silent)}, within the limit of {seconds:g} s") from None
            raise

    def _silent(self) -> list[str]:
        """Engines that had requests and made no token between three looks, and for how long."""
        now = time.monotonic()
        times = {e: now - max(e.progress_at, e.busy_from) for e in self._engines if e.up and e.calls}
        return [f"engine {e.index} ({s:.0f} s)" for e, s in times.items() if s > 3 * self.patience.watch]

    @contextlib.asynccontextmanager
    async def clock(self, seconds: float, at_end: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
        """As `asyncio.timeout`, with a clock that stands still while an engine recovers. `at_end` runs when it ends."""

        def expire() -> None:
            at_end()
            limit.reschedule(asyncio.get_running_loop().time())

        clock = _Clock(seconds, expire)
        async with asyncio.timeout(None) as limit:
            self._clocks.add(clock)
            self._start_clocks()
            try:
                yield
            finally:
                clock.stop()
                self._clocks.discard(clock)

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Clocks stand still inside, as while an engine recovers: what is waited for has its own limit."""
        self._holds += 1
        for clock in self._clocks:
            clock.stop()
        try:
            yield
        finally:
            self._holds -= 1
            self._start_clocks()

    def _start_clocks(self) -> None:
        for clock in self._clocks if not self._recoveries and not self._holds else ():
            clock.start()

    @property
    def stopping(self) -> bool:
        """True once the current round sends no more requests."""
        return self._stopping

    async def begin(self) -> int:
        """Start a round and return the weights' version, which must be the same in all engines."""
        self._stopping = False
        if self._fatal:
            raise self._fatal
        self._began = time.monotonic()
        for engine in self._engines:
            engine.busy, engine.busy_from = 0.0, self._began
        up = [engine for engine in self._engines if engine.up]
        versions = await asyncio.gather(*(engine.client.weight_info() for engine in up))
        if len(set(versions)) > 1:
            found = ", ".join(f"engine {e.index}: {v}" for e, v in zip(up, versions, strict=True))
            raise VimeError(f"engines hold weights of different versions ({found}): sync them before a rollout")
        if versions:
            self.expected_version = versions[0]
        return self.expected_version if self.expected_version is not None else -1

    async def take_seat(self, samples: int) -> Seat:
        """A seat for a group on the engine with the most room, once there is room. Raises RoundFull."""
        seat = Seat(samples)
        await self._place(seat)
        return seat

    async def generate(
        self,
        seat: Seat,
        token_ids: Sequence[int],
        settings: SamplingSettings,
        *,
        max_tokens: int,
        deadline_s: float,
        seed: int | None = None,
        routes: RoutesAsked | None = None,
    ) -> Generated:
        """One answer, repeated on failures, elsewhere when the group's engine is down.

        Raises RoundFull, or EngineError when repeating cannot help.
        """

        async def ask(engine: _Engine) -> Generated:
            return await self._call(engine, seat, token_ids, settings, max_tokens, deadline_s, seed, routes)

        return await self._repeated(seat, ask)

    async def parse(self, seat: Seat, token_ids: Sequence[int], tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tokens of an answer as a chat message, by the parsers of the group's engine. Raises as `generate`."""

        async def ask(engine: _Engine) -> dict[str, Any]:
            return await engine.client.parse(token_ids, tools)

        return await self._repeated(seat, ask)

    async def _repeated(self, seat: Seat, ask: Callable[[_Engine], Awaitable[T]]) -> T:
        for attempt in range(1, self.patience.attempts + 1):
            engine = await self._engine_of(seat)
            try:
                return await ask(engine)
            except EngineError as error:
                if self._fatal:
                    raise self._fatal from None
                self._strike(engine, error)
                if not error.retry or attempt == self.patience.attempts:
                    raise
                self.retries += 1
                log.debug("request %d repeated: %s", attempt, error)
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """Send no more requests; those that wait for an engine end with RoundFull."""
        self._stopping = True
        while self._waiting:
            _, ready = self._waiting.popleft()
            if not ready.done():
                ready.set_exception(RoundFull())

    async def abort(self) -> None:
        """Stop, and end every request under way with the tokens it has. Raises DeadlineExceeded."""
        self.stop()
        end = time.monotonic() + self.patience.abort
        while busy := [engine for engine in self._engines if engine.calls]:
            if time.monotonic() > end:
                names = ", ".join(f"{len(engine.calls)} on engine {engine.index}" for engine in busy)
                raise DeadlineExceeded(f"requests did not end within {self.patience.abort:g} s of their abort: {names}")
            await asyncio.gather(*(self._abort_engine(engine) for engine in busy))
            # A request that was still on its way to the engine is caught by the next turn.
            if calls := [call for engine in busy for call in engine.calls]:
                await asyncio.wait(calls, timeout=0.1)

    def failed(self, engine: int, error: EngineError) -> None:
        """Mark an engine as failed on outside evidence; it is not used until it has recovered."""
        self._put_down(self._engines[engine], error)

    async def settled(self) -> None:
        """Wait until every failed engine has recovered. Raises the error that ended a recovery."""
        while self._recoveries:
            await asyncio.wait(tuple(self._recoveries))
        if self._fatal:
            raise self._fatal

    def loads(self) -> list[list[int]]:
        """Samples seated on every rank of every engine."""
        return [list(engine.loads) for engine in self._engines]

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call, and the share of the round that engines were idle."""
        elapsed = max(1e-9, time.monotonic() - self._began) * max(1, len(self._engines))
        metrics = {
            "perf/engine_idle_share": max(0.0, 1 - sum(engine.busy for engine in self._engines) / elapsed),
            "rollout/request_retries": float(self.retries),
            "rollout/engines_down": float(sum(not engine.up for engine in self._engines)),
        }
        self.retries = 0
        return metrics

    async def _abort_engine(self, engine: _Engine) -> None:
        try:
            await engine.client.abort_all()
        except EngineError as error:
            self._put_down(engine, error)

    async def _call(
        self,
        engine: _Engine,
        seat: Seat,
        token_ids: Sequence[int],
        settings: SamplingSettings,
        max_tokens: int,
        deadline_s: float,
        seed: int | None,
        routes: RoutesAsked | None,
    ) -> Generated:
        rank = seat.rank if len(engine.loads) > 1 else None
        call = asyncio.create_task(
            engine.client.generate(
                token_ids,
                settings,
                max_tokens=max_tokens,
                deadline_s=deadline_s,
                seed=seed,
                data_parallel_rank=rank,
                **({} if routes is None else {"routes": routes}),
            )
        )
        if not engine.calls:
            engine.progress_at = engine.busy_from = time.monotonic()
        engine.calls.add(call)
        call.add_done_callback(engine.call_ended)
        try:
            generated = await call
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if engine.failure is None or (current and current.cancelling()):
                raise
            raise EngineTimeout(f"request given up: {engine.failure}") from None
        self._check_version(engine, generated)
        engine.strikes = 0
        return generated

    def _check_version(self, engine: _Engine, generated: Generated) -> None:
        expected = self.expected_version
        if expected is not None and generated.weight_versions and min(generated.weight_versions) < expected:
            raise EngineAnswer(
                f"engine {engine.client.url}: tokens come from weights of version {min(generated.weight_versions)}, "
                f"but the rollout is for {expected}"
            )

    async def _engine_of(self, seat: Seat) -> _Engine:
        """The group's engine, or a new one when that is down. Samples of a group move together."""
        async with seat.moving:
            if self._stopping:
                raise RoundFull
            if self._fatal:
                raise self._fatal
            if seat.engine is None or not seat.engine.up:
                self._unseat(seat)
                await self._place(seat)
            assert seat.engine is not None
            return seat.engine

    async def _place(self, seat: Seat) -> None:
        if self._stopping:
            raise RoundFull
        if self._fatal:
            raise self._fatal
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((seat, ready))
        self._serve()
        try:
            await ready
        except asyncio.CancelledError:
            self._unseat(seat)
            raise

    def _serve(self) -> None:
        """Assign waiting seats in order, while an engine has room."""
        while self._waiting:
            free = [engine for engine in self._engines if engine.has_room]
            if not free:
                return
            seat, ready = self._waiting.popleft()
            if ready.done():
                continue  # given up while it waited
            seat.engine = min(free, key=lambda engine: (engine.load / engine.client.concurrency, engine.index))
            seat.rank = min(range(len(seat.engine.loads)), key=seat.engine.loads.__getitem__)
            seat.engine.loads[seat.rank] += seat.left
            ready.set_result(None)

    def _unseat(self, seat: Seat) -> None:
        if seat.engine is not None:
            seat.engine.loads[seat.rank] -= seat.left
            seat.engine = None
            self._serve()

    def free(self, seat: Seat) -> None:
        """Free the place of a sample that needs no engine any more."""
        seat.left -= 1
        if seat.engine is not None:
            seat.engine.loads[seat.rank] -= 1
            self._serve()

    def leave(self, seat: Seat) -> None:
        """Free the seat; samples that were never requested count no longer."""
        self._unseat(seat)
        seat.left = 0

    def _strike(self, engine: _Engine, error: EngineError) -> None:
        if not error.retry:
            return
        engine.strikes += 1
        lost = not isinstance(error, EngineAnswer) and getattr(error, "status", None) is None
        if lost or engine.strikes >= self.patience.strikes:
            self._put_down(engine, error)

    def _put_down(self, engine: _Engine, error: EngineError) -> None:
        """Stop using the engine until it has recovered; its requests fail and are repeated elsewhere."""
        if not engine.up:
            return
        log.warning("engine %d is down: %s", engine.index, error)
        engine.up, engine.failure, engine.tokens = False, error, None
        for call in tuple(engine.calls):
            call.cancel()
        recovery = self._spawn(self._bring_back(engine, error))
        self._recoveries.add(recovery)
        for clock in self._clocks:
            clock.stop()
        recovery.add_done_callback(self._recovered)

    def _recovered(self, recovery: asyncio.Future[None]) -> None:
        self._recoveries.discard(recovery)
        self._start_clocks()

    async def _bring_back(self, engine: _Engine, error: EngineError) -> None:
        try:
            async with asyncio.timeout(self.patience.recovery):
                if self._recover is not None:
                    await self._recover(engine.index, error)
                await self._until_current(engine)
        except TimeoutError:
            # The next weights go to all engines, so a run cannot go on without one of them.
            self._end(
                DeadlineExceeded(f"engine {engine.index} did not recover in {self.patience.recovery:g} s: {error}")
            )
            return
        except VimeError as failure:
            self._end(failure)
            return
        log.warning("engine %d is back", engine.index)
        engine.up, engine.failure, engine.strikes = True, None, 0
        engine.progress_at = time.monotonic()
        self._serve()

    async def _until_current(self, engine: _Engine) -> None:
        pause = 0.1
        while True:
            try:
                if self.expected_version is None or await engine.client.weight_info() >= self.expected_version:
                    return
            except EngineError as error:
                engine.failure = error
            await asyncio.sleep(pause)
            pause = min(10.0, 2 * pause)

    def _end(self, error: VimeError) -> None:
        """Send nothing more; every request in flight or waiting ends with the error."""
        log.error("%s", error)
        self._fatal = self._fatal or error
        for engine in self._engines:
            engine.failure = engine.failure or EngineError(str(error))
            for call in tuple(engine.calls):
                call.cancel()
        while self._waiting:
            _, ready = self._waiting.popleft()
            if not ready.done():
                ready.set_exception(error)

    async def _watch(self) -> None:
        """Find engines that have requests but generate no tokens; their connections can stay open for hours."""
        while True:
            await asyncio.sleep(self.patience.watch)
            await asyncio.gather(*(self._look_at(e) for e in self._engines if e.up and e.calls))

    async def _look_at(self, engine: _Engine) -> None:
        try:
            text = await engine.client.metrics()
        except EngineError as error:
            self._strike(engine, error)
            return
        tokens = sum(float(value) for value in _GENERATED_TOKENS.findall(text))
        now = time.monotonic()
        if tokens != engine.tokens or not engine.calls:
            engine.tokens, engine.progress_at = tokens, now
        elif now - engine.progress_at > self.patience.stall:
            seconds = f"{now - engine.progress_at:.0f} s"
            hung = EngineTimeout(
                f"engine {engine.client.url} made no token in {seconds}, with {len(engine.calls)} requests"
            )
            self._put_down(engine, hung)

    def _spawn(self, work: Awaitable[None]) -> asyncio.Future[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Future[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            failure = VimeError(f"the watch over the engines failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            self._end(failure)
