"""Refusals before submission: engine arguments and layouts that vLLM rejects or computes incorrectly."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.recipe.flags import flag
from vime.recipe.schema import Recipe
from vime.recipe.tables import VLLM_CHOICES, VLLM_VERSION
from vime.run.plan import EnginePlan

_NO_ROUTES = ("NixlConnector", "NixlPullConnector", "NixlPushConnector", "MoRIIOConnector", "MooncakeConnector")
"""Connectors of prefill and decode on different engines, between which vLLM moves no routes."""
_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def check_engine(engine: EnginePlan, hf_config: Mapping[str, Any], *, on_gpu: bool) -> None:
    """Raise BadInput for layouts that make vLLM on CPUs compute silently wrong, or crash at the first request."""
    if on_gpu:
        return
    if engine.expert_parallel and engine.tensor_parallel_size > 1:
        raise BadInput(
            f"--vllm-enable-expert-parallel with tensor parallel {engine.tensor_parallel_size} on processors: "
            "vLLM computes wrong values there without an error; leave it out"
        )
    if engine.data_parallel_size > 1 and any(hf_config.get(name) for name in _EXPERTS):
        raise BadInput(
            f"--vllm-data-parallel-size {engine.data_parallel_size} with a mixture of experts on processors: "
            "vLLM dies at the first request there; use more engines of one rank instead"
        )


EXCLUSIVE = (
    ("enforce_eager", "cudagraph_capture_sizes"),
    ("enforce_eager", "max_cudagraph_capture_size"),
    ("speculative_config", "spec_method"),
)
"""Pairs of vLLM arguments of which one makes the other meaningless."""


def check_routes(recipe: Recipe, config: ModelConfig) -> None:
    """Raise BadInput if the engines cannot return the routes that `--use-rollout-routing-replay` asks for.

    vLLM refuses these at an engine's start (`VllmConfig._verify_aux_output_compatibility`).
    """
    option, arguments = "--use-rollout-routing-replay", recipe.engine.vllm
    if not recipe.algorithm.use_rollout_routing_replay:
        return
    if recipe.resources.device != "gpu":
        raise BadInput(f"{option} needs GPUs: vLLM's model runner that returns routes has no kernels for processors")
    if config.moe is None:
        raise BadInput(f"{option}: the model has no experts, leave it out")
    if recipe.algorithm.loss_type == "sft_loss" or recipe.misc.load_debug_rollout_data:
        raise BadInput(
            f"{option} replays what engines routed, and this run trains on no rollouts of engines: leave it out"
        )
    if arguments.get("enable_prefix_caching") is False:
        raise BadInput(
            f"{option} needs vLLM's prefix cache, which keeps the routes too: leave out --no-vllm-enable-prefix-caching"
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if int(arguments.get(name) or 1) > 1:
            raise BadInput(
                f"{option} with {flag('vllm_' + name)} {arguments[name]}: vLLM returns no routes then, give 1"
            )
    speculative = arguments.get("speculative_config")
    if isinstance(speculative, Mapping) and speculative.get("enable_adaptive_verification"):
        raise BadInput(
            f"{option} with enable_adaptive_verification of --vllm-speculative-config: vLLM returns no routes then"
        )
    transfer = json.dumps(arguments.get("kv_transfer_config") or {})
    for connector in _NO_ROUTES:
        if connector in transfer:
            raise BadInput(f"{option} with {connector} of --vllm-kv-transfer-config: vLLM returns no routes then")
    if recipe.misc.env.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise BadInput(f"{option} needs vLLM's model runner V2: leave VLLM_USE_V2_MODEL_RUNNER=0 out of --env")


def check_values(arguments: Mapping[str, Any]) -> None:
    """Raise BadInput for values, nested or not, that vLLM does not list, and for mutually exclusive arguments."""
    for name, value in _flat(arguments):
        if (known := VLLM_CHOICES.get(name)) is None or value is None:
            continue
        for one in value if isinstance(value, list) else [value]:
            if str(one) not in known:
                near = difflib.get_close_matches(str(one), known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(known[:12])}"
                option, _, key = name.partition(".")
                where = f"{flag('vllm_' + option)}" + (f" {key!r}" if key else "")
                raise BadInput(f"{where} is {one!r}, which vLLM {VLLM_VERSION} does not know: {hint}")
    for first, second in EXCLUSIVE:
        if arguments.get(first) and arguments.get(second):
            raise BadInput(f"{flag('vllm_' + first)} and {flag('vllm_' + second)} exclude each other: give one of them")


def _flat(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", each) for key, each in value.items())
