"""Rollouts: prompts are generated and scored until as many groups as training wants have passed the filter.

One module since rollouts, evaluations and saved state share one mixture, dispatcher and scorer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vime.data.rows import Columns
from vime.errors import BadInput, DataError
from vime.recipe.prompt_sources import training_sources
from vime.rewards.filters import BUILT_IN as BUILT_IN_FILTERS
from vime.rewards.filters import check_filter_path
from vime.rewards.scorer import no_answer_warning
from vime.rollout.agent_measures import conversation_metrics
from vime.rollout.client import EngineClient, EngineError
from vime.rollout.counters import EngineCounters
from vime.rollout.data import PromptStream, Tokenisation, load_prompts
from vime.rollout.dispatch import Dispatcher, Patience, Recover
from vime.rollout.evaluator import (
    evaluate_sets,
    evaluation_sets,
    make_generator,
    scorer_of,
    template_variables,
    tokenizer_of,
)
from vime.rollout.measures import by_set_metrics, finished_metrics, training_metrics
from vime.rollout.mixture import PromptMixture
from vime.rollout.routes import RouteBook, RouteShape
from vime.rollout.session import Agent
from vime.rollout.teacher import Teacher
from vime.run.left_out import left_out
from vime.run.plan import Plan
from vime.samples import UNVERSIONED, Group, Prompt, Rollout, Status, new_group

log = logging.getLogger(__name__)

TRIES_OF_A_PROMPT = 2
"""Tries of every prompt of the set after which a round counts as impossible to fill."""


@dataclass
class _Round:
    """Groups of the rollout under way, by state."""

    wanted: int
    passed: list[Group] = field(default_factory=list)
    passed_at: list[float] = field(default_factory=list)
    """Monotonic times at which the groups of `passed` passed."""
    finished: list[Group] = field(default_factory=list)
    by_set: dict[str, list[Group]] = field(default_factory=dict)
    """The groups of `finished`, by the name of their prompt set."""
    dropped: int = 0
    failed: int = 0
    active: dict[asyncio.Task[bool], Group] = field(default_factory=dict)
    ended: asyncio.Queue[asyncio.Task[bool]] = field(default_factory=asyncio.Queue)

    @property
    def open(self) -> int:
        """Groups still to be submitted if every active one passes."""
        return self.wanted - len(self.passed) - len(self.active)

    def counts(self) -> str:
        return (
            f"{len(self.passed)} of {self.wanted} groups passed; {len(self.finished)} finished, of which the filter "
            f"dropped {self.dropped}; {self.failed} failed in their reward; {len(self.active)} are under way"
        )


class Sampler:
    """Makes rollouts and evaluations of a plan with its engines. An async context manager; of one event loop.

    `recover(engine, error)` is called when an engine fails; it restarts it and gives it the current weights. Without
    it the engine is used again once it answers with the weights of the rollout. `agent` holds the conversations;
    without it each is one answer. `teacher` scores the groups that training gets.
    """

    def __init__(
        self,
        plan: Plan,
        clients: Sequence[EngineClient],
        *,
        recover: Recover | None = None,
        patience: Patience | None = None,
        tokenizer: Any = None,
        agent: Agent | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self._recipe, self._teacher = plan.recipe, teacher
        if plan.teacher is not None and teacher is None:
            raise ValueError("the plan has a teacher")
        options = plan.recipe.rollout
        check_filter_path(options.dynamic_sampling_filter_path)
        if options.rollout_temperature <= 0:
            raise BadInput(f"--rollout-temperature {options.rollout_temperature}: give a value above 0 to learn from")
        self._settings = plan.recipe.sampling
        tokenizer = tokenizer or tokenizer_of(plan)
        context = plan.context_length
        sources = training_sources(options.prompt_data)
        if not sources:
            raise BadInput("--prompt-data is not set: give a file or folder of prompts")
        variables = template_variables(plan, agent)
        training = Tokenisation(
            tokenizer,
            options.apply_chat_template,
            variables,
            min(options.rollout_max_prompt_len or context - 1, context - 1),
        )
        columns = Columns.of(plan.recipe)
        self._mixture = PromptMixture(
            {
                source.name: PromptStream(
                    load_prompts(source.path, training, columns=columns, name=source.name),
                    options.rollout_shuffle,
                    options.rollout_seed,
                )
                for source in sources
            },
            {source.name: source.weight for source in sources},
            skip_settled=options.skip_settled,
            remembers=options.curriculum is not None,
            left_out=left_out(plan.run_dir),
        )
        self._eval_sets = evaluation_sets(plan, tokenizer, variables)
        self._dispatcher = Dispatcher(
            clients, [engine.data_parallel_size for engine in plan.engines], recover=recover, patience=patience
        )
        self._counters = EngineCounters(clients)
        self._scorer = scorer_of(plan)
        self._generator = make_generator(plan, self._dispatcher, self._scorer, tokenizer, variables, agent)
        replays = plan.recipe.algorithm.use_rollout_routing_replay
        self._routes = RouteBook(RouteShape.of(plan.model), Path(plan.run_dir)) if replays else None
        """Routes of all samples under way, with `--use-rollout-routing-replay`."""
        self._next_group = 0
        self._kept: list[Group] = []
        self._rows: dict[int, tuple[str, int]] = {}
        """Prompt set, and row in it, of every unfinished group."""
        self._warned = False
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._scorer)
            await stack.enter_async_context(self._dispatcher)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def generate(self, rollout_id: int) -> Rollout:
        """The groups of one rollout, in the order of their prompts.

        Raises DataError when the round cannot fill, EngineError or DeadlineExceeded when the engines cannot answer.
        """
        options = self._recipe.rollout
        started, tokens = time.monotonic(), self._generator.tokens
        await self._dispatcher.begin()
        self._generator.take_counts()  # what an evaluation counted
        round_ = _Round(options.rollout_batch_size)
        self._kept = [self._fresh_enough(group, rollout_id) for group in self._kept]
        self._forget_routes(())
        if options.curriculum and (histories := self._mixture.histories()):
            self._mixture.set_chances(await self._scorer.chances(histories))
        try:
            async with self._dispatcher.time_limit(options.rollout_timeout):
                await self._fill(round_)
            rows = sorted({self._rows[group.index] for group in round_.passed})
        except TimeoutError:
            limit = f"--rollout-timeout {options.rollout_timeout:g} s"
            waits = f"; {text}" if self._teacher and (text := self._teacher.waited_for) else ""
            raise DataError(f"rollout {rollout_id} is not full after {limit}: {round_.counts()}{waits}") from None
        finally:
            await self._end(round_)
        seconds = time.monotonic() - started
        tail = round_.passed_at[-1] - round_.passed_at[math.ceil(0.9 * len(round_.passed)) - 1]
        tokens = self._generator.tokens - tokens
        groups = [group.with_branches() for group in sorted(round_.passed, key=lambda group: group.index)]
        self._check_staleness(groups, rollout_id)
        route_bytes = await self._write_routes(rollout_id, groups)
        metrics = {
            **finished_metrics(round_.finished),
            **training_metrics(groups, rollout_id),
            **by_set_metrics(round_.by_set if len(self._mixture.names) > 1 else {}),
            **self._scorer.take_metrics(),
            **self._mixture.take_metrics(),
            **self._dispatcher.take_metrics(),
            **await self._counters.take_rates(),
            **self._conversations(round_.finished),
            **(self._teacher.take_metrics() if self._teacher else {}),
            "rollout/filter_drops": float(round_.dropped),
            "rollout/failed_groups": float(round_.failed),
            "rollout/unfinished_groups": float(len(self._kept)),
            "rollout/tail_time": tail,
            **route_bytes,
            "perf/rollout_tokens_per_s": tokens / seconds,
        }
        self._warn_once(metrics)
        return Rollout(rollout_id, groups, metrics, rows)

    def _conversations(self, finished: Sequence[Group]) -> dict[str, float]:
        """Metrics of conversations of more than one turn, since the last call."""
        counts, dropped = self._generator.take_counts()
        if not self._recipe.agent.holds:
            return {}
        return {
            **conversation_metrics([sample for group in finished for sample in group.samples], counts),
            **self._generator.agent.take_metrics(),
            "rollout/conversations_dropped": float(dropped),
        }

    async def _write_routes(self, rollout_id: int, groups: Sequence[Group]) -> dict[str, float]:
        """Write the routes of a rollout's samples, in their order, for the trainer's ranks."""
        if self._routes is None:
            return {}
        self._forget_routes(groups)
        samples = [sample for group in groups for sample in group.samples]
        size = await asyncio.to_thread(self._routes.write, rollout_id, samples)
        return {"rollout/route_bytes": float(size)}

    def _forget_routes(self, groups: Iterable[Group]) -> None:
        """Forget the routes of all samples but these groups' and those that will go on."""
        if self._routes is not None:
            samples = (sample for group in (*groups, *self._kept) for sample in group.samples)
            self._routes.keep([sample for sample in samples if sample.response_ids])

    def _warn_once(self, metrics: Mapping[str, float]) -> None:
        """Say after the first rollout that its reward found no answer at all."""
        if not self._warned and metrics.get("rollout/no_answer_share") == 1.0:
            log.warning("%s", no_answer_warning(self._recipe.rollout.rm_type or ""))
        self._warned = True

    async def evaluate(self, rollout_id: int) -> dict[str, float]:
        """`eval/<name>` of every evaluation set, with the engines' current weights."""
        return await evaluate_sets(self._recipe, self._generator, self._eval_sets, rollout_id)

    def take_spans(self) -> list[tuple[str, float, float]]:
        """(name, start, end) in Unix seconds of work that ran during the generation since the last call."""
        return self._scorer.take_spans()

    def probes(self, count: int) -> list[list[int]]:
        """Token ids of the shortest prompts of the set, for requests that check an engine."""
        prompts = [prompt for name in self._mixture.names for prompt in self._mixture.prompts(name)]
        shortest = sorted(prompts, key=lambda prompt: (len(prompt.token_ids), prompt.number))
        return [list(prompt.token_ids) for prompt in shortest[:count]]

    def engine_failed(self, engine: int, error: EngineError) -> None:
        """Mark an engine as failed on outside evidence; its requests are repeated, and `recover` is called."""
        self._dispatcher.failed(engine, error)

    def loads(self) -> list[list[int]]:
        """Samples under way on every data-parallel rank of every engine."""
        return self._dispatcher.loads()

    async def settled(self) -> None:
        """Wait until every failed engine has recovered. Raises the error that ended a recovery."""
        await self._dispatcher.settled()

    def state_dict(self) -> dict[str, Any]:
        """Start of the next rollout as plain values: data cursor, counters and waiting groups."""
        return {
            "stream": self._mixture.state_dict(),
            "next_group": self._next_group,
            "kept": [_packed(group, self._rows[group.index]) for group in self._kept],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where `state_dict` was taken."""
        self._mixture.load_state_dict(state["stream"])
        self._next_group = int(state["next_group"])
        names = self._mixture.names
        rows = {(name, prompt.number): prompt for name in names for prompt in self._mixture.prompts(name)}
        samples = self._recipe.rollout.n_samples_per_prompt
        self._rows = {packed["index"]: (packed.get("set", names[0]), packed["row"]) for packed in state["kept"]}
        self._kept = [_unpacked(packed, rows[self._rows[packed["index"]]], samples) for packed in state["kept"]]

    async def _fill(self, round_: _Round) -> None:
        """Submit prompts and take finished groups until enough have passed."""
        while len(round_.passed) < round_.wanted:
            while round_.open > 0:
                self._check_fillable(round_)
                self._submit(round_)
            task = await round_.ended.get()
            group = round_.active.pop(task)
            passes = task.result()
            if any(sample.status == Status.FAILED for sample in group.samples):
                round_.failed += 1
            else:
                round_.finished.append(group)
                name, row = self._rows[group.index]
                round_.by_set.setdefault(name, []).append(group)
                self._mixture.record(name, row, [s.reward for s in group.samples if s.reward is not None])
                round_.dropped += not passes
                if passes:
                    round_.passed.append(group)
                    round_.passed_at.append(time.monotonic())

    def _fresh_enough(self, group: Group, rollout_id: int) -> Group:
        """The group, without its responses where their tokens would be too old for training."""
        old = rollout_id - _oldest(group, rollout_id) > self._recipe.rollout.max_staleness
        return _without_answers(group) if old else group

    def _check_staleness(self, groups: Sequence[Group], rollout_id: int) -> None:
        """The version of the trainer's weights is the number of rollouts before; it trains on these tokens next."""
        limit = self._recipe.rollout.max_staleness
        for group in groups:
            if rollout_id - (oldest := _oldest(group, rollout_id)) > limit:
                raise DataError(
                    f"group {group.index} of rollout {rollout_id} has tokens from weights of version {oldest}, more "
                    f"than --max-staleness {limit} behind: the engines were not synced"
                )

    def _check_fillable(self, round_: _Round) -> None:
        tried = len(round_.finished) + round_.failed
        if tried >= TRIES_OF_A_PROMPT * len(self._mixture) + round_.wanted:
            raise DataError(
                f"no rollout can be filled: after every one of {len(self._mixture)} prompts was tried "
                f"{TRIES_OF_A_PROMPT} times, {round_.counts()}; mean reward "
                f"{finished_metrics(round_.finished).get('rollout/raw_reward', float('nan')):.3g}"
            )

    def _submit(self, round_: _Round) -> None:
        """Start the next prompts; groups left from the last rollout come first."""
        options = self._recipe.rollout
        count = options.over_sampling_batch_size or options.rollout_batch_size
        groups, self._kept = self._kept[:count], self._kept[count:]
        for name, prompt in self._mixture.take(count - len(groups)):
            groups.append(new_group(self._next_group, prompt, options.n_samples_per_prompt))
            self._rows[self._next_group] = (name, prompt.number)
            self._next_group += 1
        for group in groups:
            task = asyncio.create_task(self._work(group))
            round_.active[task] = group
            task.add_done_callback(round_.ended.put_nowait)

    async def _work(self, group: Group) -> bool:
        """Generate and score a group; True if training wants it. Meaningless once the round was stopped."""
        if not await self._passes(group):
            return False
        if self._teacher is not None:
            await self._teacher.score(group, self._dispatcher.hold)
        return True

    async def _passes(self, group: Group) -> bool:
        limit = self._recipe.rollout.rollout_timeout
        if not await self._generator.finish(group, self._settings, limit, self._routes):
            return False
        if any(sample.status == Status.FAILED for sample in group.samples):
            return False
        if self._scorer.filters:
            return await self._scorer.keeps(group)
        path = self._recipe.rollout.dynamic_sampling_filter_path
        return path is None or BUILT_IN_FILTERS[path](group)

    async def _end(self, round_: _Round) -> None:
        """Abort the active groups; keep them for the next rollout: whole with `--partial-rollout`, else as prompts."""
        try:
            await self._dispatcher.abort()
        finally:
            for task in round_.active:
                task.cancel()
            await asyncio.gather(*round_.active, return_exceptions=True)
        unfinished = sorted((*self._kept, *round_.active.values()), key=lambda group: group.index)
        partial = self._recipe.rollout.partial_rollout
        self._kept = [group if partial else _without_answers(group) for group in unfinished]
        self._rows = {group.index: self._rows[group.index] for group in self._kept}


def _oldest(group: Group, default: int) -> int:
    """Oldest weight version among the group's tokens."""
    versions = set[int]().union(*(sample.weight_versions for sample in group.samples))
    return min(versions - {UNVERSIONED}, default=default)


def _without_answers(group: Group) -> Group:
    return Group(group.index, [sample.without_response() for sample in group.samples])


def _packed(group: Group, source: tuple[str, int]) -> dict[str, Any]:
    """A waiting group as plain values; its prompt stays in the data set."""
    # Branches are not kept: such a conversation begins again.
    kept = [sample.without_response() if sample.branches else sample for sample in group.samples]
    fresh = all(sample.status == Status.PENDING for sample in kept)
    samples = [] if fresh else [sample.response_values() for sample in kept]
    name, row = source
    return {"index": group.index, "set": name, "row": row, "samples": samples}


def _unpacked(packed: Mapping[str, Any], prompt: Prompt, samples: int) -> Group:
    group = new_group(packed["index"], prompt, len(packed["samples"]) or samples)
    for sample, values in zip(group.samples, packed["samples"], strict=False):
        sample.set_response(values)
    return group
