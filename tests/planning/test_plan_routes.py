"""Routing replay from the engines: what vLLM refuses is refused before the queue; its bytes are planned."""

from __future__ import annotations

import pytest

from tests.support.plans import plan_of
from vime.errors import BadInput
from vime.planning.build import Checks, make_plan
from vime.planning.traffic import flows
from vime.recipe.load import load_recipe
from vime.run.plan import Cluster, Plan

REPLAY = ("--device", "gpu", "--use-rollout-routing-replay")


@pytest.mark.parametrize(
    ("recipe", "flags", "said"),
    [
        ("tiny-deepseek-r1", ("--use-rollout-routing-replay",), "needs GPUs"),
        ("tiny-qwen3", REPLAY, "the model has no experts"),
        ("tiny-deepseek-r1", (*REPLAY, "--use-routing-replay"), "give one"),
        ("tiny-deepseek-r1", (*REPLAY, "--no-vllm-enable-prefix-caching"), "prefix cache"),
        ("tiny-deepseek-r1", (*REPLAY, "--vllm-decode-context-parallel-size", "2"), "context-parallel-size 2"),
        (
            "tiny-deepseek-r1",
            (*REPLAY, "--vllm-kv-transfer-config", '{"kv_connector": "NixlConnector"}'),
            "with NixlConnector",
        ),
        ("tiny-deepseek-r1", (*REPLAY, "--env", '{"VLLM_USE_V2_MODEL_RUNNER": "0"}'), "model runner V2"),
        ("tiny-deepseek-r1", (*REPLAY, "--loss-type", "sft_loss"), "trains on no rollouts of engines"),
    ],
)
def test_what_returns_no_routes_is_refused(recipe: str, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        plan_of(recipe, *flags)


def r1(*flags: str) -> Plan:
    gpus = Cluster(name="gpus", kind="slurm", gpus_per_node=8)
    checks = Checks(inputs=False, run_folder=False)
    return make_plan(load_recipe("deepseek-r1", flags), cluster=gpus, base_dir="/base", checks=checks)


def test_the_routes_of_the_r1_recipe_are_in_the_drivers_memory_and_in_the_traffic() -> None:
    plan = r1(*REPLAY)
    rollout = plan.recipe.rollout
    tokens = rollout.samples * (rollout.rollout_max_response_len + (rollout.rollout_max_prompt_len or 1024))
    found = [{item.name: item.bytes for item in node.host_memory.items}.get("routes", 0) for node in plan.nodes]
    assert found == [tokens * 61 * 8, *[0] * 15]
    assert [flow.bytes for flow in flows(plan) if flow.name == "routes"] == [2 * found[0]]
    assert not [flow for flow in flows(r1()) if flow.name == "routes"]
