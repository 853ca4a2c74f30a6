"""Mapping between this rank's parameter and buffer names and the name map's global parameters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.namemap import Param
from vime.models.shards import local_shape, tensor_split
from vime.recipe.parallel import Coordinates, ParallelLayout

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_SEQUENTIAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.weight(\d+)$")
# Transformer Engine fuses a norm into the matrix after it.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Wrappers for mixed precision and data parallelism; counters and workspaces that no checkpoint holds.
_WRAPPERS = re.compile(r"^(module\.)+")
_NOT_WEIGHTS = ("_extra_state", "local_tokens_per_expert", "inv_freq")


@dataclass(frozen=True)
class LocalTensor:
    """A parameter or persistent buffer of this rank, with the global parameter that it is (a shard of)."""

    chunk: int
    """Index of the model chunk."""
    name: str
    """Name in the chunk, without wrappers."""
    tensor: torch.Tensor
    param: Param


def global_name(name: str, config: ModelConfig, layout: ParallelLayout, coords: Coordinates) -> str:
    """Whole-model name for a name in this rank's chunk."""
    name = _WRAPPERS.sub("", name)
    first = layout.stage_layers(config.num_layers)[coords.pp].start
    name = _LAYER.sub(lambda match: f"decoder.layers.{int(match[1]) + first}.", name)
    for fused, plain in _FUSED_NORMS.items():
        name = name.replace(fused, plain)
    if config.moe is not None:
        offset = coords.ep * (config.moe.num_experts // layout.ep)
        name = _SEQUENTIAL_EXPERT.sub(lambda match: f".local_experts.{int(match[1]) + offset}.", name)
        name = _GROUPED_EXPERT.sub(
            lambda match: f".experts.local_experts.{int(match[2]) + offset}.{match[1]}.weight", name
        )
    if config.tie_word_embeddings and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return name


def local_tensors(
    chunks: Sequence[torch.nn.Module], config: ModelConfig, layout: ParallelLayout, coords: Coordinates
) -> list[LocalTensor]:
    """All weights of this rank with their global parameters, in the order of the model.

    A global parameter can occur twice (the embedding's copy for MTP layers or a tied head), but not on a single stage.
    Raises AssertionError if model and name map disagree, which is a defect of one of them.
    """
    table = {param.name: param for param in params_of(config)}
    found = []
    for number, chunk in enumerate(chunks):
        for name, tensor in _weights(chunk):
            whole = global_name(name, config, layout, coords)
            param = table.get(whole)
            assert param is not None, f"{name} is {whole} in the whole model, which the name map does not know"
            wanted = local_shape(param, tensor_split(param, layout, coords)[1])
            assert tuple(tensor.shape) == wanted, f"{whole}: shape {tuple(tensor.shape)} here, {wanted} by the map"
            found.append(LocalTensor(number, name, tensor, param))
    return found


def _weights(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    persistent = chunk.state_dict(keep_vars=True)
    for name, tensor in persistent.items():
        if torch.is_tensor(tensor) and not name.endswith(_NOT_WEIGHTS):
            yield _WRAPPERS.sub("", name), tensor


def fill(tensors: Iterable[LocalTensor], source: Callable[[Param], torch.Tensor]) -> None:
    """Copy weights into the model: `source` returns this rank's shard of a parameter, in any dtype, on any device."""
    with torch.no_grad():
        for local in tensors:
            local.tensor.copy_(source(local.param))
