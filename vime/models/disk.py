"""Places of parameters in a torch_dist checkpoint: the key, and the index in a key that holds several parameters.

Keys are those of stock Megatron with Transformer Engine, whichever layer spec runs: norms fused into the following
matrix if that spec fuses them, routed experts of a layer stacked under one key, likewise the layers of a dense model.
So checkpoints move freely between CPUs and GPUs, and Megatron's own loader reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vime.models.config import ModelConfig
from vime.models.namemap import Param, Where

_LAYER = re.compile(r"^(decoder\.layers\.(?:(\d+)\.)?|mtp\.layers\.\d+\.transformer_layer\.)(.+)$")
_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")
_MLA_NORMS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_NORMS = {
    "input_layernorm", "pre_mlp_layernorm", "final_layernorm", "q_layernorm", "k_layernorm", "enorm", "hnorm",
}  # fmt: skip
"""Norms that Transformer Engine's spec keeps as separate modules (when it fuses them, the key differs)."""
_GROUPED_NORMS = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_NORMS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


@dataclass(frozen=True)
class DiskPlace:
    """Place of a parameter: `key[index]`, where the whole key has shape `stack + param.shape`."""

    key: str
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()


def disk_place(param: Param, config: ModelConfig) -> DiskPlace:
    """Place of the parameter in a checkpoint written by vime or Megatron."""
    key, index, stack = canonical_key(param.name, config), [], []
    if param.where == Where.DECODER and stacks_layers(config):
        assert param.layer is not None
        key = key.replace(f"decoder.layers.{param.layer}.", "decoder.layers.", 1)
        index.append(param.layer)
        stack.append(config.num_layers)
    if param.expert is not None:
        assert config.moe is not None
        key = _EXPERT.sub(".experts.experts.", key, count=1)
        index.append(param.expert)
        stack.append(config.moe.num_experts)
    return DiskPlace(key, tuple(index), tuple(stack))


def extra_states(param: Param, config: ModelConfig) -> Iterator[DiskPlace]:
    """Places of the empty objects that Megatron with Transformer Engine expects with a parameter.

    Each Transformer Engine module has its own state (`_extra_state`, empty without fp8): linear layers, attention, and
    since version 1.13 norms not fused into a matrix. The state is returned with the module's weight.
    """
    place = disk_place(param, config)
    module, _, leaf = place.key.rpartition(".")
    parent, _, name = module.rpartition(".")
    if leaf != "weight":
        return
    if name.startswith("linear_") or name == "eh_proj" or name in _NORMS:
        yield DiskPlace(f"{module}._extra_state", place.index, place.stack)
    if name == "linear_proj":
        yield DiskPlace(f"{parent}.core_attention._extra_state", place.index, place.stack)


def stacks_layers(config: ModelConfig) -> bool:
    """True if Megatron stacks all decoder layers under one key, since all are alike and none has experts."""
    return config.moe is None


def canonical_key(key: str, config: ModelConfig) -> str:
    """A key or parameter name of any layer spec, with norms named as in Transformer Engine's spec."""
    match = _LAYER.match(key)
    if match is None:
        return key
    prefix, number, rest = match.groups()
    moe = config.is_moe_layer(int(number)) if number is not None else config.moe is not None
    # Grouped attention's local spec fuses the second norm's name even before experts, where nothing fuses the norm.
    for plain, fused in _DENSE_NORMS.items():
        if rest.startswith(fused):
            rest = plain + rest.removeprefix(fused)
    fusions = {**(_MLA_NORMS if config.mla else _GROUPED_NORMS), **({} if moe else _DENSE_NORMS)}
    if config.mla and config.mla.q_lora_rank is None:
        fusions.pop("self_attention.q_layernorm.")
    for plain, fused in fusions.items():
        if rest.startswith(plain):
            rest = fused + rest.removeprefix(plain)
    return prefix + rest
