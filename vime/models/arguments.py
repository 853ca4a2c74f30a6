"""Checks of user-given Megatron model flags against the checkpoint's `config.json`."""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vime.errors import BadInput
from vime.models.config import ModelConfig
from vime.models.families import gpt_arguments, megatron_config
from vime.recipe.tables import MEGATRON_MODEL_FLAGS

# Training or implementation choices that no checkpoint determines: the value that vime trains with (None: no fixed
# value), and the reason why another one has no effect.
_NO_BALANCE = "no balancing loss is trained"
_FREE: dict[str, tuple[Any, str]] = {
    "init_method_std": (None, "weights are loaded"),
    "make_vocab_size_divisible_by": (None, "the vocabulary is not padded"),
    "max_position_embeddings": (None, "config.json decides it"),
    "moe_aux_loss_coeff": (0, _NO_BALANCE),
    "moe_grouped_gemm": (True, "it follows from Transformer Engine being installed"),
    "moe_permute_fusion": (True, "it follows from Transformer Engine being installed"),
    "moe_router_bias_update_rate": (0, "the router's bias is frozen"),
    "moe_router_dtype": ("fp32", "the router computes in fp32"),
    "moe_router_load_balancing_type": (None, _NO_BALANCE),
    "no_rope_fusion": (True, "rope is not fused"),
}


def ignored_args(given: Mapping[str, Any]) -> list[str]:
    """Notes about flags that are accepted but have no effect."""
    return [
        f"--{name.replace('_', '-')} {_show(value)} has no effect: {_FREE[name][1]}"
        for name, value in given.items()
        if name in _FREE and not _same(value, _FREE[name][0])
    ]


def check_model_args(config: ModelConfig, given: Mapping[str, Any]) -> None:
    """Raise BadInput for the first flag (named with underscores) that contradicts `config.json`."""
    expected = expected_args(config)
    for name, value in given.items():
        if name in _FREE or (name == "kv_channels" and config.mla):  # latent attention has no such size
            continue
        flag = "--" + name.replace("_", "-")
        wanted = expected.get(name)
        if name == "moe_layer_freq":
            value = read_layer_frequency(value, config.num_layers)
            if config.moe is None:
                raise BadInput(f"{flag} is given, but config.json describes a dense model: leave it out")
        if not _same(value, wanted):
            instead = "leave it out" if wanted in (None, False) else f"give {_show(wanted)} or leave it out"
            raise BadInput(f"{flag} is {_show(value)}, but config.json implies {_show(wanted)}: {instead}")


def expected_args(config: ModelConfig) -> dict[str, Any]:
    """Expected value of every comparable flag for this model; None for a flag that does not apply to it."""
    megatron, gpt = megatron_config(config), gpt_arguments(config)
    grouped = config.mla is None and config.num_kv_heads < config.num_attention_heads
    names = {
        "norm_epsilon": megatron["layernorm_epsilon"],
        "num_experts": megatron.get("num_moe_experts"),
        "vocab_size": config.vocab_size,
        "swiglu": True,
        "disable_bias_linear": True,
        "use_rotary_position_embeddings": True,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "group_query_attention": grouped,
        "num_query_groups": config.num_kv_heads,
        "position_embedding_type": gpt["position_embedding_type"],
        "rotary_base": config.rope.theta,
        "rotary_percent": gpt["rotary_percent"],
        "use_rope_scaling": gpt["rope_scaling"],
        "rope_scaling_factor": config.rope.factor if gpt["rope_scaling"] else None,
    }
    return {**megatron, **names}


def shell_arguments(config: ModelConfig) -> list[str]:
    """The model as Megatron command-line words, for calling Megatron by hand."""
    words = []
    for name, value in expected_args(config).items():
        if name not in MEGATRON_MODEL_FLAGS or value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list):
            words.append("+".join(f"[{each}]*{sum(1 for _ in run)}" for each, run in itertools.groupby(value)))
        elif value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return words


def read_layer_frequency(value: Any, layers: int) -> list[int]:
    """Parse Megatron's `--moe-layer-freq`: every Nth layer, a list, or an expression like `([0]*3+[1]*58)`."""
    if isinstance(value, str):
        try:
            value = _evaluate(ast.parse(value.strip(), mode="eval").body)
        except (SyntaxError, ValueError) as error:
            raise BadInput(
                f"--moe-layer-freq is {value!r}: write a number or an expression like ([0]*3+[1]*58)"
            ) from error
    if isinstance(value, int):
        return [int(i % value == 0) for i in range(layers)]
    return list(value)


def _evaluate(node: ast.expr) -> Any:
    """Evaluate sums and products of small lists and numbers, nothing else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(element) for element in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Add) and type(left) is type(right):
            return left + right
        if isinstance(node.op, ast.Mult) and not (isinstance(left, list) and isinstance(right, list)):
            return left * right
    raise ValueError("not a list expression")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return bool(a) == bool(b)
    if isinstance(a, int | float | str) and isinstance(b, int | float):
        try:
            return math.isclose(float(a), float(b), rel_tol=1e-9)
        except ValueError:
            return False
    return a == b


def _show(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 8:
        return f"[{', '.join(map(str, value[:8]))}, …] ({len(value)} layers)"
    return "not set" if value is None else str(value)
