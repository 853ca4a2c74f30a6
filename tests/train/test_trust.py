"""An engine is trusted only where its log-probs are the trainer's. The engines and the trainer here are fakes."""

import pytest

from tests.support import patience
from tests.support.fake_engine import FakeEngine
from tests.support.plans import plan_of
from vime.train.trust import (
    ROUNDED_NUMBERS,
    SAME_NUMBERS,
    EngineDistrusted,
    check_trust,
    differences,
    mean_difference,
    probe_settings,
    trusted_difference,
)

PROMPTS = [[1, 2], [3]]


async def trainers(sequences):
    assert all(response == [7, 8] for _, response in sequences)
    return [[-0.5, -1.0] for _ in sequences]


async def compare(plan, *clients, version=3):
    return await differences(
        clients, plan.engines, PROMPTS, probe_settings(plan), trainers, deadline_s=patience.STUB, version=version
    )


async def test_every_rank_of_every_engine_is_asked_and_the_worst_counts():
    flags = ("--actor-num-gpus-per-node", "2", "--rollout-num-gpus-per-engine", "2", "--vllm-data-parallel-size", "2")
    plan = plan_of("tiny-qwen3", *flags)
    engines = [FakeEngine(), FakeEngine(off=0.25, wrong_rank=1)]
    assert await compare(plan, *engines) == pytest.approx([0.0, 0.25])
    assert {(tuple(prompt), rank) for prompt, rank, _ in engines[1].asked} == {
        ((1, 2), 0), ((3,), 0), ((1, 2), 1), ((3,), 1),
    }  # fmt: skip


async def test_tokens_of_other_weights_than_those_just_synced_are_no_proof():
    plan = plan_of("tiny-qwen3")
    with pytest.raises(EngineDistrusted, match=r"engine 1 answered with weights of version \[2\] after the sync of 3"):
        await compare(plan, FakeEngine(), FakeEngine(version=2))


def test_an_engine_at_the_bound_is_named_with_the_difference_and_the_bound():
    plan = plan_of("tiny-qwen3", "--max-logprob-difference", "0.2")
    check_trust(plan, plan.engines, [0.1, 0.19], 1)
    for wrong in (0.2, 3.0, float("nan")):
        with pytest.raises(EngineDistrusted, match=r"engine 1 .* trusted is less than 0\.2") as caught:
            check_trust(plan, plan.engines, [0.1, wrong], 1)
        assert caught.value.engine == 1


def test_the_bound_is_wider_only_where_trained_weights_are_quantised():
    quantised = plan_of("tiny-deepseek-r1")
    assert trusted_difference(quantised, 0) == SAME_NUMBERS
    assert trusted_difference(quantised, 5) == ROUNDED_NUMBERS
    assert trusted_difference(plan_of("tiny-qwen3"), 5) == SAME_NUMBERS


def test_probes_draw_from_every_token_at_the_rollouts_temperature():
    settings = probe_settings(plan_of("tiny-qwen3", "--rollout-temperature", "0.7"))
    assert (settings.top_p, settings.top_k, settings.temperature) == (1.0, -1, 0.7)
    assert probe_settings(plan_of("tiny-qwen3", "--rollout-top-p", "0.9")).top_p == 1.0
    assert settings.max_tokens == 8  # as many as a rollout's answers have at most


def test_the_difference_is_the_mean_over_all_tokens_not_over_samples():
    assert mean_difference([[-1.0], [-1.0, -1.0, -1.0]], [[-3.0], [-1.0, -1.0, -1.0]]) == 0.5
