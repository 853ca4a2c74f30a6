"""The teacher of on-policy distillation: log-probs of finished samples, from engines that are waited for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec

from vime.errors import Cause, VimeError
from vime.rollout.answers import MISSING_LOG_PROB, Answer
from vime.rollout.client import EngineAnswer, EngineClient, EngineError
from vime.rollout.generation import all_of
from vime.samples import Group, Sample
from vime.system.clock import Stopwatch

log = logging.getLogger(__name__)

CONCURRENCY = 32
"""Requests in flight for each engine: whole samples that are read once, of which few fill an engine."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
ATTEMPTS = 6
"""Requests for one sample that fail, at a teacher that scores others, before the run ends."""

Recover = Callable[[int, EngineError], Awaitable[bool]]
"""Called with the place of an engine of the teacher and how it failed. Returns True after a restart, False where its
process runs. Raises VimeError where it cannot be restarted."""
Hold = Callable[[], AbstractContextManager[None]]


class TeacherFailed(VimeError):
    """The teacher did not score a sample: it was away or late for too long, or cannot."""

    def __init__(self, text: str, cause: Cause) -> None:
        super().__init__(text)
        self.cause = cause


_DECODER = msgspec.json.Decoder(Answer)


def parse_scores(body: bytes, token_ids: Sequence[int], start: int) -> list[float]:
    """Log-probs in nats of the tokens from place `start` above 0 on, out of the answer to `EngineClient.score`.

    All but the last are those of vLLM's prompt. Raises EngineAnswer if counts, tokens or values cannot be right.
    """
    try:
        answer = _DECODER.decode(body)
    except msgspec.MsgspecError as error:
        raise EngineAnswer(f"answer is not what vLLM documents: {error}") from error
    found = answer.prompt_logprobs
    if found is None or len(found) != len(token_ids) - 1:
        raise EngineAnswer(f"answer scores {len(found or ())} of {len(token_ids) - 1} tokens of its prompt")
    sampled = [
        (str(token), each)
        for choice in answer.choices
        if choice.logprobs
        for token, each in zip(choice.token_ids or (), choice.logprobs.content or (), strict=False)
    ]
    found.append(dict(sampled))
    values = []
    for place in range(start, len(token_ids)):
        scored = (found[place] or {}).get(str(token_ids[place]))
        if scored is None:
            raise EngineAnswer(f"answer has no log-prob of token {token_ids[place]} at place {place}")
        values.append(scored.logprob)
    if values and (not math.isfinite(sum(values)) or min(values) <= MISSING_LOG_PROB or max(values) > 1e-3):
        raise EngineAnswer("answer has log-probs that are missing, positive or not finite")
    return values


@dataclass(eq=False)
class _Seat:
    """One engine of the teacher."""

    place: int
    client: EngineClient
    rests_until: float = 0.0
    """Monotonic time before which it gets requests only if every other one rests too."""


@dataclass
class _Trial:
    """A sample that is being scored."""

    sample: int
    began: float
    failures: int = 0
    alone: int = 0
    """Failures while the teacher scored others."""


class Teacher:
    """Scores samples with the engines of one teacher. Of one event loop.

    `folder` names it in errors. An engine that fails is asked again after a pause; `recover` restarts one whose process
    ended. The run ends once no engine answered for `patience_s` seconds, or one request took that long.
    """

    def __init__(
        self, folder: str, clients: Sequence[EngineClient], *, patience_s: float, recover: Recover | None = None
    ) -> None:
        self._folder, self._patience_s, self._recover = folder, patience_s, recover
        self._seats = [_Seat(place, client) for place, client in enumerate(clients)]
        self._answered_at, self._said_away = time.monotonic(), False
        self._retries, self._under_way, self._busy_s, self._busy = 0, 0, 0.0, Stopwatch()

    async def score(self, group: Group, hold: Hold = contextlib.nullcontext) -> None:
        """Set `teacher_log_probs` of every sample of the group and of its branches that lacks them.

        `hold` is entered while a sample waits for a teacher that failed it. Raises TeacherFailed.
        """
        samples = [each for sample in group.samples for each in (sample, *sample.branches)]
        lacking = (each for each in samples if len(each.teacher_log_probs) != len(each.response_ids))
        await all_of(self._score(sample, hold) for sample in lacking)

    def take_metrics(self) -> dict[str, float]:
        """Since the last call: seconds with a request under way, and requests that were repeated."""
        metrics = {"perf/teacher_time": self._busy_s, "rollout/teacher_retries": float(self._retries)}
        self._busy_s, self._retries = 0.0, 0
        return metrics

    @property
    def waited_for(self) -> str:
        """Samples that it has still to score, in words; empty without any."""
        return f"{self._under_way} samples wait for {self._name}" if self._under_way else ""

    async def _score(self, sample: Sample, hold: Hold) -> None:
        if not self._under_way:
            self._busy = Stopwatch()
        self._under_way += 1
        try:
            with contextlib.ExitStack() as waits:
                sample.teacher_log_probs = await self._log_probs(sample, waits, hold)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._busy_s += self._busy.seconds

    async def _log_probs(self, sample: Sample, waits: contextlib.ExitStack, hold: Hold) -> list[float]:
        token_ids, trial = [*sample.prompt_ids, *sample.response_ids], _Trial(sample.index, time.monotonic())
        pause = FIRST_PAUSE_SECONDS
        while True:
            seat, began = self._seat(), time.monotonic()
            try:
                answer = await seat.client.score(token_ids, deadline_s=self._patience_s)
                values = parse_scores(answer, token_ids, len(sample.prompt_ids))
            except EngineError as error:
                if not trial.failures:
                    waits.enter_context(hold())
                trial.failures += 1
                self._retries += 1
                seat.rests_until = time.monotonic() + pause
                await self._failed(seat, trial, error, began)
            else:
                self._is_here()
                return values
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _seat(self) -> _Seat:
        """The engine with the fewest requests among those that do not rest."""
        now = time.monotonic()
        return min(self._seats, key=lambda seat: (max(0.0, seat.rests_until - now), seat.client.in_flight))

    async def _failed(self, seat: _Seat, trial: _Trial, error: EngineError, began: float) -> None:
        """Restart the engine if it ended. Raises TeacherFailed where asking again cannot help, or patience is over."""
        if not error.retry:
            raise TeacherFailed(
                f"{self._name} cannot score sample {trial.sample}: {error}", Cause.DATA_ERROR
            ) from error
        if self._recover is not None and await self._recover(seat.place, error):
            self._is_here()
            return
        now = time.monotonic()
        if self._answered_at > trial.began:
            trial.alone += 1
        if trial.alone >= ATTEMPTS:
            text = f"{self._name} failed {trial.alone} times on sample {trial.sample} and scored others: {error}"
            raise TeacherFailed(text, Cause.CRASH) from error
        if now - max(trial.began, self._answered_at) > self._patience_s or now - began >= self._patience_s:
            text = f"{self._name} was away or late for {self._patience_s:g} s (--opd-teacher-patience): {error}"
            raise TeacherFailed(text, Cause.CRASH) from error
        if not self._said_away:
            self._said_away = True
            log.warning("%s did not answer (%s): samples wait for it", self._name, error)

    def _is_here(self) -> None:
        self._answered_at, self._said_away = time.monotonic(), False

    @property
    def _name(self) -> str:
        return f"the teacher {self._folder}"
