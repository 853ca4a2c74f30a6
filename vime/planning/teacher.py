"""The teacher of on-policy distillation before the queue: what excludes it, what its folder holds, what it takes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.folder import check_kind, check_tokenizer
from vime.planning.engines import check_values
from vime.planning.gpu_memory import ENGINE_CONTEXT, ENGINE_RESERVE
from vime.planning.inputs import check_shards, read_json
from vime.recipe.algorithms import PURE_DISTILLATION
from vime.recipe.flags import find_target
from vime.recipe.load import change
from vime.recipe.schema import Recipe
from vime.run.plan import EnginePlan, Item, Memory, context_length

SHARE = 0.85
"""Default of `gpu_memory_utilization`: vLLM's own measurement holds no logits of whole prompts."""
BATCHED_TOKENS = 2048
"""Default of `max_num_batched_tokens`, which bounds the tokens of a prompt whose logits are in memory at a time."""
LOGIT_BYTES = 12
"""Bytes of a logit of a prompt's token in vLLM: bf16, fp32, its log-softmax in fp32, and what ranks it."""


@dataclass(frozen=True)
class Teacher:
    """Facts about the teacher that the plan is made from."""

    path: str
    hf_config: Mapping[str, Any]
    """Its `config.json`; empty where the folder is not at hand."""
    weights_bytes: int
    max_model_len: int


def check_distillation(recipe: Recipe) -> None:
    """Raise BadInput for options that `--use-opd` excludes, or that exclude one another without it."""
    algorithm, rollout, pure = recipe.algorithm, recipe.rollout, not recipe.needs_reward
    if not algorithm.use_opd:
        if pure:
            raise BadInput(
                f"--advantage-estimator {PURE_DISTILLATION} gives no advantage of its own: give --use-opd with "
                "--opd-teacher, or another estimator"
            )
        return
    if algorithm.loss_type == "sft_loss":
        raise BadInput("--use-opd adds to advantages, and --loss-type sft_loss has none: give one of them")
    if rollout.rollout_temperature != 1:
        raise BadInput(
            f"--use-opd needs --rollout-temperature 1, here {rollout.rollout_temperature:g}: vLLM gives the log-probs "
            "of the teacher at temperature 1 only, and the student's would be at another"
        )
    if pure and not algorithm.opd_kl_coef:
        raise BadInput(
            f"--opd-kl-coef 0 with --advantage-estimator {PURE_DISTILLATION} leaves nothing to learn from: give a "
            "coefficient above 0"
        )
    if pure and rollout.rm_type is None:
        _check_without_rewards(recipe)
    if not recipe.needs_teacher:
        return
    if recipe.teacher.opd_teacher is None:
        raise BadInput("--use-opd needs --opd-teacher, the HF folder of the teacher")
    for name in recipe.teacher.opd_teacher_vllm:
        try:
            find_target(f"vllm_{name}")
        except BadInput as error:
            raise BadInput(f"--opd-teacher-vllm {name}: {error}") from error
    check_values(recipe.teacher.opd_teacher_vllm)


def _check_without_rewards(recipe: Recipe) -> None:
    rollout = recipe.rollout
    wanting = {
        "--dynamic-sampling-filter-path": rollout.dynamic_sampling_filter_path == "check_reward_nonzero_std",
        "--skip-settled": rollout.skip_settled,
        "--curriculum": rollout.curriculum,
        "--overlong-buffer-len": recipe.algorithm.overlong_buffer_len,
        "--eval-prompt-data": recipe.eval.eval_prompt_data,
    }
    if given := [option for option, needs in wanting.items() if needs]:
        raise BadInput(f"{given[0]} looks at rewards, and there is no --rm-type: leave it out, or give one")


def longest_request(recipe: Recipe, config: ModelConfig) -> int:
    """Tokens of the longest prompt and response."""
    context, rollout = context_length(recipe, config), recipe.rollout
    prompt = rollout.rollout_max_prompt_len or context
    return min(context, prompt + rollout.rollout_max_response_len)


def look(recipe: Recipe, config: ModelConfig, *, required: bool, on_gpu: bool) -> tuple[Teacher | None, list[str]]:
    """The recipe's teacher, None if it needs none, and notes. `config`: the student's.

    Raises BadInput for a folder that cannot teach this student. A missing folder is a note unless it is `required`.
    """
    path = recipe.teacher.opd_teacher
    if not recipe.needs_teacher or path is None:
        return None, []
    longest = longest_request(recipe, config)
    folder = Path(path)
    if not required and not (folder / "config.json").is_file():
        return Teacher(path, {}, 0, longest), [
            f"planned without the teacher's size: there is no {path}/config.json here"
        ]
    try:
        hf = read_json(folder / "config.json")
        if required:
            check_shards(folder)
        check_kind(folder)
        check_tokenizer(folder, trust_remote_code=recipe.checkpoint.trust_remote_code)
    except BadInput as error:
        raise BadInput(f"--opd-teacher: {error}") from error
    if hf.get("quantization_config") and not on_gpu:
        raise BadInput(
            f"--opd-teacher {path} is quantised, which vLLM does not load on processors: give it in bf16 "
            "(python -m vime.checkpoint.cast makes such a folder)"
        )
    _check_vocabulary(recipe, config, folder, hf)
    _check_length(path, hf, longest, recipe.teacher.opd_teacher_vllm.get("max_model_len"))
    return Teacher(path, hf, weights_bytes(recipe), longest), []


def with_defaults(recipe: Recipe, teacher: Teacher | None, gpus: int, *, on_gpu: bool) -> Recipe:
    """The recipe with the arguments of the teacher's engines and their GPUs filled in."""
    if teacher is None:
        return recipe
    defaults: dict[str, Any] = {"max_model_len": teacher.max_model_len, "max_num_batched_tokens": BATCHED_TOKENS}
    if on_gpu:
        defaults["gpu_memory_utilization"] = SHARE
    arguments = {**defaults, **recipe.teacher.opd_teacher_vllm}
    return change(recipe, teacher={"opd_teacher_num_gpus": gpus, "opd_teacher_vllm": arguments})


def gpu_memory(recipe: Recipe, teacher: Teacher, engine: EnginePlan, gpu_bytes: int) -> tuple[Memory, int]:
    """Estimate for one GPU of the teacher's engines, and the bytes by which it exceeds the GPU."""
    arguments = recipe.teacher.opd_teacher_vllm
    share = float(arguments.get("gpu_memory_utilization", SHARE))
    over = engine.tensor_parallel_size * (engine.data_parallel_size if engine.expert_parallel else 1)
    tokens, columns = int(arguments.get("max_num_batched_tokens", BATCHED_TOKENS)), _vocabulary(teacher.hf_config)
    weights, logits = math.ceil(teacher.weights_bytes / over), tokens * columns * LOGIT_BYTES
    budget = int(share * gpu_bytes)
    cache = budget - weights - ENGINE_RESERVE
    beyond = logits + ENGINE_CONTEXT - (gpu_bytes - budget)
    why = f"what is left of {budget / 1e9:.0f} GB (gpu_memory_utilization {share:g})"
    items = (
        Item(name="weights", bytes=weights, why=f"{teacher.weights_bytes / 1e9:.1f} GB over {over} GPUs"),
        Item(name="reserve", bytes=ENGINE_RESERVE, why="CUDA context and graphs, NCCL, vLLM's activations"),
        Item(name="kv_cache", bytes=max(0, cache), why=why),
        Item(name="prompt_logits", bytes=logits, why=f"{LOGIT_BYTES} bytes x {tokens:,} tokens x {columns:,} logits"),
    )
    return Memory(items=items, total_bytes=sum(item.bytes for item in items)), max(0, -cache) + max(0, beyond)


def _vocabulary(hf: Mapping[str, Any]) -> int:
    """Number of token ids; 0 where the configuration has none."""
    text = hf.get("text_config")
    found = hf.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    return found if isinstance(found, int) else 0


def _check_vocabulary(recipe: Recipe, config: ModelConfig, folder: Path, hf: Mapping[str, Any]) -> None:
    """Raise BadInput where a token id means another token to the teacher, or none."""
    student = Path(recipe.checkpoint.hf_checkpoint or "")
    sizes = f"{_vocabulary(hf)} token ids, and the student {student} {config.vocab_size}"
    remedy = "give a teacher with the student's tokenizer"
    mine, theirs = student / "tokenizer.json", folder / "tokenizer.json"
    same = _same_bytes(mine, theirs)
    if same is None:
        if _vocabulary(hf) != config.vocab_size:
            raise BadInput(f"--opd-teacher {folder} has {sizes}: {remedy}")
        return
    if not same and (differing := next(_differing(_token_ids(mine), _token_ids(theirs)), None)) is not None:
        raise BadInput(f"--opd-teacher {folder} has {sizes}, and {differing}: {remedy}")
    if _vocabulary(hf) < config.vocab_size:
        raise BadInput(f"--opd-teacher {folder} has {sizes}: the student can sample ids that it cannot score; {remedy}")


def _same_bytes(first: Path, second: Path) -> bool | None:
    """True if two files are equal; None if one is missing."""
    try:
        return first.stat().st_size == second.stat().st_size and first.read_bytes() == second.read_bytes()
    except OSError:
        return None


def _token_ids(file: Path) -> dict[str, int]:
    """Token -> id of a `tokenizer.json`. Raises BadInput for a file that is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        # Unigram models list (token, score) pairs in the order of their ids.
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((t, i) for i, (t, _) in enumerate(vocabulary))
        return {**dict(pairs), **{one["content"]: one["id"] for one in content.get("added_tokens") or ()}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file} is not a tokenizer of Hugging Face: {type(error).__name__}: {error}") from error


def _differing(student: Mapping[str, int], teacher: Mapping[str, int]) -> Iterator[str]:
    """Tokens whose id is not the same in both, in words."""
    for token in student.keys() | teacher.keys():
        if student.get(token) != teacher.get(token):
            said = [f"{who} {ids.get(token, 'none')}" for who, ids in (("its", teacher), ("the student's", student))]
            yield f"token {token[:40]!r} has other ids ({', '.join(said)})"


def _check_length(path: str, hf: Mapping[str, Any], longest: int, given: object) -> None:
    """Raise BadInput for a teacher that cannot take the longest sample."""
    text = hf.get("text_config")
    positions = hf.get("max_position_embeddings", (text or {}).get("max_position_embeddings"))
    for what, limit in (("max_model_len of --opd-teacher-vllm", given), (f"--opd-teacher {path} with", positions)):
        if isinstance(limit, int) and limit < longest:
            raise BadInput(
                f"{what} {limit} positions is too short for the student's longest prompt and response, {longest} "
                "tokens: give a smaller --vllm-max-model-len, --rollout-max-prompt-len or "
                "--rollout-max-response-len"
            )


def weights_bytes(recipe: Recipe) -> int:
    """Bytes of the teacher's safetensors files; 0 without a teacher or its folder."""
    return _bytes_of(recipe.teacher.opd_teacher) if recipe.needs_teacher and recipe.teacher.opd_teacher else 0


@functools.cache
def _bytes_of(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
