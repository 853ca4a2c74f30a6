"""Building this rank's part of a model from its description, a layout and the recipe's options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vime.errors import BadInput
from vime.megatron import backend
from vime.megatron.parallel import refuse_wrong
from vime.models import families
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class BuildOptions:
    """Recipe options for Megatron's model. GPU-only options have no effect on a CPU."""

    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_softmax_in_fp32: bool = False
    attention_backend: str = "auto"
    moe_enable_deepep: bool = False
    moe_token_dispatcher_type: str = "alltoall"
    use_routing_replay: bool = False
    use_rollout_routing_replay: bool = False

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> BuildOptions:
        values = {**recipe.perf.model_dump(), **recipe.misc.model_dump(), **recipe.algorithm.model_dump()}
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def without_effect(self, cpu: bool) -> list[str]:
        """Sentences about options that are accepted but have no effect on this device."""
        if not cpu:
            return []
        found = []
        if self.moe_enable_deepep or self.moe_token_dispatcher_type == "flex":
            found.append("--moe-enable-deepep and the flex dispatcher need GPUs: alltoall dispatches the tokens here")
        if self.attention_backend not in ("auto", "unfused", "local"):
            found.append(f"--attention-backend {self.attention_backend} needs a GPU: torch's attention is used here")
        if self.recompute_granularity == "selective":
            found.append("--recompute-granularity selective needs a GPU for latent attention: nothing is recomputed")
        return found


def build_model(
    config: ModelConfig,
    layout: ParallelLayout,
    *,
    bf16: bool,
    mtp: bool = False,
    options: BuildOptions | None = None,
) -> list[GPTModel]:
    """Build this rank's model chunks (one), on the device, in bf16 or fp32, without mixed-precision or DDP wrappers.

    `mtp` builds the multi-token-prediction layers (on the last stage, with a copy of the embedding). Raises BadInput
    for a layout that does not fit. Requires `init_parallel`.
    """
    refuse_wrong(config, layout)
    device = backend.setup()
    from megatron.core import parallel_state

    from vime.megatron.layers import PolicyModel, decoder_spec, mtp_spec

    mtp = mtp and config.mtp_layers > 0
    megatron = megatron_config(config, layout, bf16=bf16, mtp=mtp, options=options or BuildOptions())
    spec = decoder_spec(megatron, transformer_engine=device.transformer_engine)
    model = PolicyModel(
        config=megatron,
        transformer_layer_spec=spec,
        vocab_size=config.padded_vocab_size(layout.tp),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        mtp_block_spec=mtp_spec(megatron, spec, transformer_engine=device.transformer_engine) if mtp else None,
        **families.gpt_arguments(config),
    )
    model.to(device.device)
    if bf16:
        _to_bf16(model)
    _mark_experts(model, config, layout)
    return [model]


def megatron_config(
    config: ModelConfig, layout: ParallelLayout, *, bf16: bool, mtp: bool, options: BuildOptions
) -> TransformerConfig:
    """Megatron's configuration of a model under a layout."""
    from megatron.core.transformer.enums import AttnBackend
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    device = backend.setup()
    dtype = torch.bfloat16 if bf16 else torch.float32
    values: dict[str, Any] = {
        **families.megatron_config(config),
        "activation_func": F.silu,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel and layout.tp > 1,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers if layout.pp > 1 else None,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers if layout.pp > 1 else None,
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        # Packed micro-batches differ in length, so pipeline stages exchange the lengths.
        "variable_seq_lengths": layout.pp > 1,
        # vime normalises the loss over the whole step; Megatron only sums.
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": True,
        "attention_dropout": options.attention_dropout,
        "hidden_dropout": options.hidden_dropout,
        "attention_softmax_in_fp32": options.attention_softmax_in_fp32,
        "attention_backend": AttnBackend[options.attention_backend],
        "mtp_num_layers": config.mtp_layers if mtp else None,
        # Loading overwrites the weights, but initialisation marks which parameters are tensor-parallel (needed by the
        # gradient norm). Each rank initialises only its own shard, on a CPU too.
        "perform_initialization": True,
        "use_cpu_initialization": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": not device.cpu,
        "bias_activation_fusion": not device.cpu,
        "persist_layer_norm": device.transformer_engine,
    }
    if not device.cpu or options.recompute_granularity == "full":
        values |= {
            "recompute_granularity": options.recompute_granularity,
            "recompute_method": options.recompute_method,
            "recompute_num_layers": options.recompute_num_layers,
        }
    if config.moe is not None:
        values |= _moe_values(options, layout, device)
    else:
        values["moe_token_dispatcher_type"] = "alltoall"
    return (MLATransformerConfig if config.mla else TransformerConfig)(**values)


def _moe_values(options: BuildOptions, layout: ParallelLayout, device: backend.Backend) -> dict[str, Any]:
    dispatcher = options.moe_token_dispatcher_type
    if dispatcher == "allgather" and layout.pp > 1:
        raise BadInput(
            f"--moe-token-dispatcher-type allgather cannot take packed micro-batches of different lengths through "
            f"PP{layout.pp}: use alltoall"
        )
    if device.cpu and dispatcher == "flex":
        dispatcher = "alltoall"
    values: dict[str, Any] = {
        "moe_token_dispatcher_type": dispatcher,
        "moe_enable_routing_replay": options.use_routing_replay or options.use_rollout_routing_replay,
        # Grouped matrix products and the fused permutation require Transformer Engine.
        "moe_grouped_gemm": device.transformer_engine,
        "moe_permute_fusion": device.transformer_engine,
    }
    if dispatcher == "flex":
        values["moe_flex_dispatcher_backend"] = "deepep"
    return values


def _to_bf16(model: torch.nn.Module) -> None:
    """Convert floating-point parameters and buffers to bf16, except the router's bias, whose updates are tiny."""
    for name, parameter in model.named_parameters():
        if not name.endswith("expert_bias") and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def _mark_experts(model: torch.nn.Module, config: ModelConfig, layout: ParallelLayout) -> None:
    """Make Megatron sum expert gradients over the expert-data-parallel ranks.

    Megatron marks experts only if the expert parallel size is above 1. With tensor parallelism and an expert tensor
    size of 1 the experts are replicated over the tensor-parallel ranks too, and without the mark their gradients would
    be summed over too few ranks.
    """
    if config.moe is None or layout.edp == layout.dp * layout.cp:
        return
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
