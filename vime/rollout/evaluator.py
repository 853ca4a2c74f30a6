"""Evaluation with engines alone, and what it shares with the sampler of training: prompt sets, scorer, generator."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

from vime.data.rows import Columns
from vime.errors import DataError
from vime.recipe.prompt_sources import evaluation_sources
from vime.recipe.schema import Recipe
from vime.rewards.scorer import Scorer
from vime.rollout.chat import ChatTemplate
from vime.rollout.client import EngineClient
from vime.rollout.data import PromptSet, Tokenisation, load_prompts, load_tokenizer
from vime.rollout.dispatch import Dispatcher
from vime.rollout.evaluate import evaluate
from vime.rollout.generation import Generator
from vime.rollout.session import Agent, Budget, Settings, SingleTurn
from vime.run.plan import Plan


class Evaluator:
    """Evaluates the weights that the engines hold. An async context manager; of one event loop."""

    def __init__(self, plan: Plan, clients: Sequence[EngineClient], *, agent: Agent | None = None) -> None:
        self._recipe = plan.recipe
        tokenizer, variables = tokenizer_of(plan), template_variables(plan, agent)
        self._sets = evaluation_sets(plan, tokenizer, variables)
        self._dispatcher = Dispatcher(clients, [engine.data_parallel_size for engine in plan.engines])
        self._scorer = scorer_of(plan)
        self._generator = make_generator(plan, self._dispatcher, self._scorer, tokenizer, variables, agent)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._scorer)
            await stack.enter_async_context(self._dispatcher)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def evaluate(self, rollout_id: int) -> dict[str, float]:
        """`eval/<name>` of every evaluation set."""
        return await evaluate_sets(self._recipe, self._generator, self._sets, rollout_id)


async def evaluate_sets(
    recipe: Recipe, generator: Generator, sets: Sequence[PromptSet], rollout_id: int
) -> dict[str, float]:
    """`eval/<name>` of every set, with the engines' current weights. Raises DataError after `--rollout-timeout`."""
    limit, samples = recipe.rollout.rollout_timeout, recipe.eval.n_samples_per_eval_prompt
    await generator.dispatcher.begin()
    try:
        async with generator.dispatcher.time_limit(limit):
            return await evaluate(generator, sets, recipe.eval_sampling, samples, limit)
    except TimeoutError:
        raise DataError(f"evaluation {rollout_id} did not end within --rollout-timeout {limit:g} s") from None


def tokenizer_of(plan: Plan) -> Any:
    """Tokenizer of the plan's HF checkpoint."""
    checkpoint = plan.recipe.checkpoint
    return load_tokenizer(checkpoint.hf_checkpoint or "", trust_remote_code=checkpoint.trust_remote_code)


def template_variables(plan: Plan, agent: Agent | None) -> dict[str, Any]:
    """Variables of the chat template, the agent's tools included."""
    tools = {"tools": list(agent.tools)} if agent and agent.tools else {}
    return {**plan.recipe.rollout.apply_chat_template_kwargs, **tools}


def evaluation_sets(plan: Plan, tokenizer: Any, variables: Mapping[str, Any]) -> list[PromptSet]:
    """Prompts of `--eval-prompt-data`, without those longer than the engines take."""
    recipe, context = plan.recipe, plan.context_length
    longest = min(recipe.eval.eval_max_prompt_len or context - 1, context - 1)
    tokens = Tokenisation(tokenizer, recipe.rollout.apply_chat_template, dict(variables), longest)
    columns = Columns.of(recipe)
    return [
        load_prompts(source.path, tokens, columns=columns, name=source.name)
        for source in evaluation_sources(recipe.eval.eval_prompt_data)
    ]


def scorer_of(plan: Plan) -> Scorer:
    """Rewards, filter and curriculum of the recipe."""
    options = plan.recipe.rollout
    return Scorer(
        options.rm_type,
        limit_s=options.rm_timeout,
        rm_url=options.rm_url,
        filter_path=options.dynamic_sampling_filter_path,
        curriculum=options.curriculum,
        patience_s=options.rm_patience,
        optional=not plan.recipe.needs_reward,
    )


def make_generator(
    plan: Plan,
    dispatcher: Dispatcher,
    scorer: Scorer,
    tokenizer: Any,
    variables: Mapping[str, Any],
    agent: Agent | None,
) -> Generator:
    """Generator of the recipe's conversations on these engines."""
    options = plan.recipe.rollout
    settings = Settings(
        dispatcher,
        ChatTemplate(tokenizer, dict(variables), options.rollout_stop_token_ids),
        plan.recipe.sampling,
        plan.context_length,
        options.rollout_timeout,
        _budget(plan.recipe),
        seed=options.rollout_seed if options.rollout_sample_seeds else None,
        divergence=plan.recipe.agent.on_template_divergence,
    )
    return Generator(scorer, settings, agent or SingleTurn(), mask_old_tokens=options.mask_offpolicy_in_partial_rollout)


def _budget(recipe: Recipe) -> Budget:
    options = recipe.agent
    if not options.holds:
        return Budget()
    seconds = options.turn_timeout, options.conversation_timeout
    return Budget(options.max_turns, options.max_tokens_per_turn, *seconds)
