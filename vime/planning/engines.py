"""Layouts of engines that vLLM takes and then computes wrong, refused before anything is submitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vime.errors import BadInput
from vime.run.plan import EnginePlan

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def check_engine(engine: EnginePlan, hf_config: Mapping[str, Any], *, on_gpu: bool) -> None:
    """BadInput for layouts that vLLM on processors computes wrong without an error, or dies of at the first request."""
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
