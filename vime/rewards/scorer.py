"""Gives every sample of a group its reward, by the recipe's `--rm-type`, and keeps count of what went wrong."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from vime.errors import BadInput, DataError
from vime.rewards.extract import has_answer
from vime.rewards.filters import BUILT_IN as BUILT_IN_FILTERS
from vime.rewards.names import BAD_LABEL, BUILT_IN, GROUP_PREFIX
from vime.rewards.pool import CallFailed, CallTimeout, ProcessPool
from vime.rewards.remote import RemoteReward
from vime.samples import Group, Sample, Status
from vime.system.clock import Stopwatch

log = logging.getLogger(__name__)

MOST_FAILURES = 0.1
"""Share of the samples whose reward may fail before the run ends."""
_FEWEST_FOR_A_SHARE = 32
_NOTHING = "none"
"""Stands for no `--rm-type`."""


class Scorer:
    """Rewards and plug-in filters in worker processes. An async context manager.

    `rm_type` is a built-in name, `remote` (with `rm_url`), `package.module:function` of a Sample, or
    `group:package.module:function` of a list of samples that returns as many rewards. A row's `metadata["rm_type"]`
    may choose another built-in name for it.
    """

    def __init__(
        self,
        rm_type: str | None,
        *,
        limit_s: float,
        rm_url: str | None = None,
        filter_path: str | None = None,
        workers: int | None = None,
        curriculum: str | None = None,
        patience_s: float = 900.0,
        optional: bool = False,
    ) -> None:
        """`optional`: without `rm_type` every reward is 0, for training that looks at none."""
        if rm_type is None and not optional:
            raise BadInput(
                f"--rm-type is not set: give one of {', '.join(BUILT_IN)}, remote, or package.module:function"
            )
        rm_type = rm_type or _NOTHING
        if rm_type not in BUILT_IN and rm_type != _NOTHING and rm_type != "remote" and ":" not in rm_type:
            known = ", ".join(BUILT_IN)
            raise BadInput(
                f"--rm-type {rm_type} is unknown: give one of {known}, remote, or package.module:function "
                "(docs/rewards.md)"
            )
        if rm_type == "remote" and not rm_url:
            raise BadInput("--rm-type remote needs --rm-url, the address of the reward server")
        self._rm_type, self._limit_s = rm_type, limit_s
        self._remote = RemoteReward(rm_url, patience_s=patience_s) if rm_type == "remote" and rm_url else None
        self._filter = filter_path if filter_path and filter_path not in BUILT_IN_FILTERS else None
        targets = [built_in.target for name, built_in in BUILT_IN.items() if name == rm_type]
        if rm_type not in BUILT_IN and rm_type != _NOTHING and self._remote is None:
            targets.append(rm_type.removeprefix(GROUP_PREFIX))
        if self._filter:
            targets.append(self._filter)
        if curriculum is not None and ":" not in curriculum:
            raise BadInput(f"--curriculum {curriculum} is not a function: give package.module:function")
        self._curriculum = curriculum
        if curriculum:
            targets.append(curriculum)
        self._pool = ProcessPool(targets, workers)
        self._stack = contextlib.AsyncExitStack()
        self.scored = self.failed = self.timed_out = self.raised = self.unanswered = 0
        self.first_failure = ""
        self._window: tuple[float, float] | None = None
        self._under_way, self._busy_s, self._busy = 0, 0.0, Stopwatch()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._pool)
            if self._remote:
                await stack.enter_async_context(self._remote)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def of_groups(self) -> bool:
        """Whether the reward function looks at a whole group at once."""
        return self._rm_type.startswith(GROUP_PREFIX)

    @property
    def filters(self) -> bool:
        """Whether the filter is a plug-in, which `keeps` asks."""
        return self._filter is not None

    @property
    def workers_replaced(self) -> int:
        """Worker processes that were killed or died."""
        return self._pool.replaced

    async def score(self, group: Group) -> None:
        """Set the reward of every finished sample of the group.

        A sample whose function fails keeps the reward None and becomes `failed`; its group cannot be trained on.
        Raises DataError once more than the allowed share of samples has failed.
        """
        if self.of_groups:
            with self._measured():
                await self._score_group(group)
        else:
            await asyncio.gather(*(self.score_sample(sample) for sample in group.samples))

    async def score_sample(self, sample: Sample) -> None:
        """Set the reward of one sample; as `score`. Not for group rewards."""
        if self._rm_type == _NOTHING:
            sample.reward = 0.0
            return
        self.scored += 1
        name = sample.metadata.get("rm_type", self._rm_type)
        self.unanswered += name in BUILT_IN and not has_answer(name, sample.response)
        if name != self._rm_type and name not in BUILT_IN:
            self._fail([sample], f"metadata rm_type {name!r} is none of {', '.join(BUILT_IN)}")
            return
        try:
            with self._measured():
                sample.reward = self._checked(await self._reward(sample, name))
        except CallTimeout as error:
            if name not in BUILT_IN:
                self._fail([sample], str(error))
                return
            self.timed_out += 1
            sample.reward = BUILT_IN[name].wrong
        except CallFailed as error:
            if name not in BUILT_IN or BAD_LABEL in str(error):
                self._fail([sample], str(error))
                return
            self.raised += 1
            sample.reward = BUILT_IN[name].wrong
            log.debug("sample %d of group %d: %s", sample.index, sample.group_index, error)

    async def keeps(self, group: Group) -> bool:
        """The plug-in filter's verdict; its failure drops the group and counts as one."""
        assert self._filter is not None
        self.scored += 1
        try:
            return bool(await self._pool.call(self._filter, group, limit_s=self._limit_s))
        except (CallTimeout, CallFailed) as error:
            self._fail([], f"filter: {error}")
            return False

    async def chances(self, histories: Sequence[Any]) -> list[float]:
        """The curriculum's chance of every prompt to be taken. Raises DataError where its function fails."""
        assert self._curriculum is not None
        try:
            found = await self._pool.call(self._curriculum, list(histories), limit_s=self._limit_s)
        except (CallTimeout, CallFailed) as error:
            raise DataError(f"--curriculum: {error}") from error
        if not isinstance(found, list):
            raise DataError(f"--curriculum {self._curriculum} gave {found!r:.100}, not a list of numbers")
        return [float(chance) for chance in found]

    def take_metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        metrics = {
            "rollout/reward_failures": float(self.failed),
            "rollout/reward_timeouts": float(self.timed_out),
            "rollout/reward_errors": float(self.raised),
            "perf/reward_time": self._busy_s,
        }
        if self.scored and self._rm_type in BUILT_IN:
            metrics["rollout/no_answer_share"] = self.unanswered / self.scored
        self.scored = self.failed = self.timed_out = self.raised = self.unanswered = 0
        self._busy_s = 0.0
        return metrics

    def take_spans(self) -> list[tuple[str, float, float]]:
        """From the first reward that was asked for to the last that came, in Unix seconds, since the last call."""
        window, self._window = self._window, None
        return [("reward", *window)] if window else []

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        """Counts the time in which at least one reward is under way."""
        if not self._under_way:
            self._busy = Stopwatch()
        self._under_way += 1
        watch = Stopwatch()
        start = self._window[0] if self._window else watch.start
        try:
            yield
        finally:
            self._under_way -= 1
            self._window = (start if self._window is None else self._window[0], watch.end)
            if not self._under_way:
                self._busy_s += self._busy.seconds

    async def _reward(self, sample: Sample, name: str) -> Any:
        if name == "remote":
            assert self._remote is not None
            return await self._remote(sample, self._limit_s)
        if name in BUILT_IN:
            return await self._call(BUILT_IN[name].target, _text_of(sample))
        return await self._call(name, sample)

    async def _call(self, target: str, sample: Sample) -> Any:
        return await self._pool.call(target, sample, limit_s=self._limit_s, group=sample.group_index)

    async def _score_group(self, group: Group) -> None:
        self.scored += len(group.samples)
        target = self._rm_type.removeprefix(GROUP_PREFIX)
        try:
            rewards = await self._pool.call(target, group.samples, limit_s=self._limit_s * len(group.samples))
            if not isinstance(rewards, list) or len(rewards) != len(group.samples):
                raise CallFailed(f"{target} returned {rewards!r:.100} for {len(group.samples)} samples")
            for sample, reward in zip(group.samples, rewards, strict=True):
                sample.reward = self._checked(reward)
        except (CallTimeout, CallFailed) as error:
            self._fail(group.samples, str(error))

    def _checked(self, reward: Any) -> float:
        if not isinstance(reward, (int, float)) or not math.isfinite(reward):
            raise CallFailed(f"--rm-type {self._rm_type} gave {reward!r}, not a finite number")
        return float(reward)

    def _fail(self, samples: list[Sample], why: str) -> None:
        for sample in samples:
            sample.reward, sample.status = None, Status.FAILED
        self.failed += max(1, len(samples))
        who = f"sample {samples[0].index} of group {samples[0].group_index}: " if samples else ""
        self.first_failure = self.first_failure or who + why
        if self.failed > MOST_FAILURES * max(self.scored, _FEWEST_FOR_A_SHARE):
            counts = f"{self.failed} of {self.scored} rewards failed, more than {MOST_FAILURES:.0%}"
            raise DataError(f"{counts}; first: {self.first_failure}")


def no_answer_warning(rm_type: str) -> str:
    """Hint for a rollout without a single response that had an answer for the reward to grade."""
    if rm_type == "deepscaler":
        return (
            "--rm-type deepscaler gives 0 to every response of this rollout: none has </think>. For a model "
            "that does not think give --rm-type math; for one that does, a longer --rollout-max-response-len"
        )
    return f"--rm-type {rm_type} found no answer in any response of this rollout: look at the samples in the report"


def _text_of(sample: Sample) -> Sample:
    """The sample without its token lists, which the built-in functions do not look at."""
    lists = ("prompt_ids", "response_ids", "log_probs", "weight_versions", "loss_mask", "teacher_log_probs", "turns")
    return replace(sample, **{name: [] for name in lists}, branches=[])
