"""Command line and environment of a vLLM server as data: a pure function of plan, binding and position.

Secrets (the API key) are not included; `vime.rollout.engine` adds them to the process's environment.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vime.errors import BadInput
from vime.recipe.load import bf16_folder
from vime.run.devices import device_variables
from vime.run.plan import Binding, BoundNode, EnginePlan, Plan

MODEL_NAME, TEACHER_NAME = "policy", "teacher"
"""Names under which engines serve the trained model and its teacher."""

WEIGHT_BACKENDS = {"gpu": "vime", "cpu": "vime-shm"}
"""Names of the weight-transfer backends that vime.sync registers in vLLM."""

IDLE_SECONDS = 30
"""Time for which the client keeps a connection that nobody uses."""

_FROM_PLAN = ("data_parallel_size", "enable_expert_parallel")
_KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
_START_METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_KV_CACHE_GIB = "1"


@dataclass(frozen=True)
class EngineCommand:
    """Command that starts one node's part of an engine."""

    argv: tuple[str, ...]
    """Arguments after the Python interpreter."""
    env: dict[str, str]
    """Variables added to the environment; no secrets."""
    serves: bool
    """True if this node answers HTTP: an engine's first node."""
    url: str
    """Address of the engine's server, on its first node."""
    model: str
    """Name under which it serves its model."""


def model_path(plan: Plan) -> str:
    """Folder that the engines load: the HF checkpoint, or on CPUs the bf16 copy of a quantised one.

    vLLM cannot load block fp8 on CPUs without AMX. Raises BadInput without an HF checkpoint.
    """
    checkpoint = plan.recipe.checkpoint.hf_checkpoint
    if checkpoint is None:
        raise BadInput("--hf-checkpoint is not set: engines load their first weights and the tokenizer from it")
    if plan.on_gpu or "quantization_config" not in plan.model_config_hf:
        return checkpoint
    for stage in plan.stages:
        for output in stage.outputs if stage.name == "cast" else ():
            if output.kind == "hf":
                return output.path
    return bf16_folder(plan.recipe)


def engine_command(
    plan: Plan,
    binding: Binding,
    engine: EnginePlan,
    position: int,
    cpus: Sequence[int],
    visible: str | None = None,
) -> EngineCommand:
    """Command of the engine's part on its node number `position`.

    `cpus`: cores its process may use; `visible`: GPUs left visible by the caller of a local run. Raises BadInput
    without an HF checkpoint.
    """
    leader = binding.nodes[engine.nodes[0]]
    here = binding.nodes[engine.nodes[position]]
    serves = position == 0
    teaches = is_teachers(plan, engine)
    arguments = plan.recipe.teacher.opd_teacher_vllm if teaches else plan.recipe.engine.vllm
    argv = [
        *("-m", "vime.rollout.serve", model_path(plan) if plan.teacher is None or not teaches else plan.teacher.path),
        *_meeting_place(engine, position, leader, binding.port_offset),
        *(_server_arguments(leader, engine.port + binding.port_offset) if serves else ()),
        *(_teacher_arguments() if teaches else _weights_and_samples(plan, engine)),
        *_device_arguments(plan, arguments, teaches=teaches),
        *_remote_code(plan, arguments),
        *_flags({name: value for name, value in arguments.items() if name not in _FROM_PLAN}),
    ]
    url = f"http://{_bracketed(leader.address)}:{engine.port + binding.port_offset}"
    env = _environment(plan, binding, engine, position, here, cpus, visible)
    return EngineCommand(tuple(argv), env, serves, url, TEACHER_NAME if teaches else MODEL_NAME)


def is_teachers(plan: Plan, engine: EnginePlan) -> bool:
    """True if this engine of the plan serves the teacher."""
    return plan.teacher is not None and engine.index >= len(plan.engines)


def _meeting_place(engine: EnginePlan, position: int, leader: BoundNode, port_offset: int) -> Iterator[str]:
    """Options for parallel sizes and, with data parallelism, for how the engine's nodes find its leader."""
    tensor, data = engine.tensor_parallel_size, engine.data_parallel_size
    yield from ("--tensor-parallel-size", str(tensor))
    if engine.expert_parallel:
        yield "--enable-expert-parallel"
    if data == 1:
        return
    local = [len(gpus) // tensor for gpus in engine.gpus]
    yield from ("--data-parallel-size", str(data), "--data-parallel-size-local", str(local[position]))
    yield from ("--data-parallel-address", leader.address)
    yield from ("--data-parallel-rpc-port", str(engine.aux_port + port_offset))
    if position > 0:
        # Followers only: on the leader, naming the first rank would switch vLLM to one server per node.
        yield from ("--headless", "--data-parallel-start-rank", str(sum(local[:position])))


def _server_arguments(node: BoundNode, port: int) -> Iterator[str]:
    yield from ("--host", node.address, "--port", str(port))
    # One API process, because aborting all requests reaches only those of the process that gets the call.
    yield from ("--api-server-count", "1")
    # vLLM's own key check leaves the weight-update and remote-call routes open.
    yield from ("--middleware", "vime.rollout.fast_answers.GuardedAnswers")
    yield from ("--enable-scale-out", "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning")


def _weights_and_samples(plan: Plan, engine: EnginePlan) -> Iterator[str]:
    backend = WEIGHT_BACKENDS["gpu" if plan.on_gpu else "cpu"]
    yield from ("--served-model-name", MODEL_NAME)
    yield from ("--weight-transfer-config", _compact({"backend": backend}))
    # Training takes log-probs over all tokens: with top-p or top-k these are the raw ones, at temperature 1 (the plan's
    # check), else the processed ones, which hold the temperature.
    yield from ("--logprobs-mode", "raw_logprobs" if plan.recipe.sampling.truncated else "processed_logprobs")
    if plan.recipe.algorithm.use_rollout_routing_replay:
        yield "--enable-return-routed-experts"
    # Engines with the same seed would draw the same random numbers.
    yield from ("--seed", str(plan.recipe.rollout.rollout_seed + engine.index))


def _teacher_arguments() -> Iterator[str]:
    yield from ("--served-model-name", TEACHER_NAME)
    # Its weights never change, and it only scores: vLLM takes log-probs of a prompt before any sampling parameter.
    yield from ("--logprobs-mode", "raw_logprobs")


def _device_arguments(plan: Plan, arguments: Mapping[str, Any], *, teaches: bool) -> Iterator[str]:
    if plan.on_gpu:
        if plan.recipe.resources.colocate and not teaches:
            yield "--enable-sleep-mode"
        return
    if not arguments.get("enforce_eager"):
        yield "--enforce-eager"
    if not teaches and "enable_chunked_prefill" not in arguments:
        # Of a prompt that is cut in two vLLM rewinds the generator, which for a seeded request ends it on CPUs.
        yield "--no-enable-chunked-prefill"
    # On CPUs vLLM's fused rotary embedding gives wrong log-probs for multi-head latent attention.
    yield "-cc.custom_ops+=-rotary_embedding"


def _remote_code(plan: Plan, arguments: Mapping[str, Any]) -> Iterator[str]:
    """The recipe's own switch covers the engines; `--vllm-trust-remote-code` covers them alone."""
    if plan.recipe.checkpoint.trust_remote_code and "trust_remote_code" not in arguments:
        yield "--trust-remote-code"


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    """Options in vLLM's spelling: switches for booleans, JSON for mappings, several words for lists."""
    for name, value in values.items():
        flag = name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, Mapping):
            yield from (f"--{flag}", _compact(value))
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield from (f"--{flag}", str(value))


def _environment(
    plan: Plan,
    binding: Binding,
    engine: EnginePlan,
    position: int,
    here: BoundNode,
    cpus: Sequence[int],
    visible: str | None,
) -> dict[str, str]:
    # The cluster profile's interfaces and NCCL settings are already in every task's environment.
    env = {name: value for name, value in plan.recipe.misc.env.items() if name not in plan.cluster.env}
    env |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": here.address}
    if _KEEP_ALIVE not in plan.cluster.env:
        # Else the server closes idle connections, after 5 s, of which one may just have got a request.
        env.setdefault(_KEEP_ALIVE, str(4 * IDLE_SECONDS))
    teaches = is_teachers(plan, engine)
    if not teaches:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # the routes of weight updates, pausing and sleeping
    if plan.recipe.algorithm.use_rollout_routing_replay and not teaches:
        env["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # the one that returns routes
    if engine.data_parallel_size > 1:
        # The leader searches from here for free ports where its ranks meet; `aux_port` itself is the handshake's.
        env["VLLM_PORT"] = str(engine.aux_port + binding.port_offset + 1)
    if plan.on_gpu:
        env |= device_variables(engine.gpus[position], visible)
        if _START_METHOD not in plan.cluster.env:
            # `vllm serve` would start the engine's processes as new ones, which load every library again: 20 s. vLLM
            # does so all the same where CUDA is in use already.
            env.setdefault(_START_METHOD, "fork")
        if not teaches and (plan.model_config_hf.get("quantization_config") or {}).get("scale_fmt") != "ue8m0":
            # DeepGEMM would round every weight's scales up to powers of two and quantise the weights again, so the
            # engine would not compute with the weights that were synced.
            env.setdefault("VLLM_USE_DEEP_GEMM_E8M0", "0")
        return env
    env.setdefault("VLLM_CPU_KVCACHE_SPACE", _KV_CACHE_GIB)
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", thread_binding(cpus, len(engine.gpus[position])))
    return env


def thread_binding(cpus: Sequence[int], ranks: int) -> str:
    """Cores of each of this node's ranks in vLLM's format: divided evenly, shared if there are too few."""
    if len(cpus) < ranks:
        return "|".join(str(cpus[rank % len(cpus)]) for rank in range(ranks))
    bounds = [len(cpus) * rank // ranks for rank in range(ranks + 1)]
    return "|".join(",".join(map(str, cpus[a:b])) for a, b in itertools.pairwise(bounds))


def _bracketed(address: str) -> str:
    try:
        return f"[{address}]" if ipaddress.ip_address(address).version == 6 else address
    except ValueError:
        return address


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
