"""Megatron-LM's `load_checkpoint` at its defaults, step by step, on a model of the core's own spec.

Megatron-LM's training code is not installed with the core; the order of its steps is that of training/checkpointing.py
at the core's version.
"""

from __future__ import annotations

import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vime.checkpoint.torch_dist import use_disk_keys
from vime.megatron import backend
from vime.megatron.model import BuildOptions, megatron_config
from vime.models import families
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout

COMPARED = ("num_layers", "hidden_size", "num_attention_heads", "add_position_embedding")
"""Arguments that `check_checkpoint_args` compares without a vocabulary file."""
TAKEN = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "num_query_groups"),
    *("group_query_attention", "kv_channels", "max_position_embeddings", "position_embedding_type"),
    *("add_position_embedding", "use_rotary_position_embeddings", "rotary_base", "rotary_percent"),
    *("rotary_interleaved", "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu"),
    *("untie_embeddings_and_output_weights", "apply_layernorm_1p", "normalization", "apply_query_key_layer_scaling"),
    *("attention_dropout", "hidden_dropout", "padded_vocab_size", "ckpt_format"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
)
"""Arguments that `load_args_from_checkpoint` takes of any model of ours."""
TAKEN_OF_EXPERTS = (
    *("num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax"),
    *("moe_grouped_gemm", "moe_router_score_function", "moe_router_enable_expert_bias", "moe_token_dispatcher_type"),
)


def core_model(config: ModelConfig, layout: ParallelLayout, *, mtp: bool) -> Any:
    """GPTModel of the core with Megatron-LM's own spec: Transformer Engine's where it runs, else the local one.

    The core's local attention cannot be built for latent attention: there it is ours, which has no parameters either.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from vime.megatron.layers import decoder_spec, mtp_spec

    megatron = megatron_config(config, layout, bf16=False, mtp=mtp, options=BuildOptions())
    device = backend.setup()
    engine = device.transformer_engine
    if config.mla and not engine:
        spec = decoder_spec(megatron, transformer_engine=False)
    else:
        spec = get_gpt_decoder_block_spec(megatron, use_transformer_engine=engine, normalization="RMSNorm")
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=spec,
        vocab_size=config.padded_vocab_size(layout.tp),
        mtp_block_spec=mtp_spec(megatron, spec, transformer_engine=engine) if mtp else None,
        **families.gpt_arguments(config),
    )
    return model.to(device.device)


def load_checkpoint(
    folder: Path, model: Any, optimizer: Any, scheduler: Any, args: Namespace, config: ModelConfig, *, release: bool
) -> int:
    """Load as Megatron-LM does with `--load` alone; returns the iteration."""
    from megatron.core import dist_checkpointing, tensor_parallel
    from megatron.core import parallel_state as ps

    common = dist_checkpointing.load_common_state_dict(str(folder))
    theirs = common["args"]
    same_cut = (theirs.tensor_model_parallel_size, theirs.pipeline_model_parallel_size) == (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
    )
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}
    metadata["dp_cp_group"] = ps.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0}
    state["model"] = model.sharded_state_dict(metadata=metadata)
    if not backend.setup().transformer_engine:
        # The core's local spec has other keys than Transformer Engine's, which Megatron-LM's default has.
        use_disk_keys(state["model"], config)
    with_optimizer = not release and not theirs.no_save_optim
    if with_optimizer:
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata, is_loading=True)
        state["opt_param_scheduler"] = scheduler.state_dict()
        if same_cut and not theirs.no_save_rng:
            state["rng_state"] = _random_state()
    loaded: Any = dist_checkpointing.load(state, str(folder), strict="assume_ok_unexpected")
    iteration = 0 if release else loaded["iteration"]
    for name in COMPARED:
        assert getattr(loaded["args"], name) == getattr(args, name), name
    model.load_state_dict(loaded["model"], strict=True)
    if with_optimizer:
        _take_optimizer(optimizer, loaded["optimizer"])
        scheduler.load_state_dict(loaded["opt_param_scheduler"])
        states = loaded["rng_state"][0]
        random.setstate(states["random_rng_state"])
        np.random.set_state(states["np_rng_state"])
        torch.set_rng_state(states["torch_rng_state"])
        assert states["rng_tracker_states"]
        tensor_parallel.get_cuda_rng_tracker().set_states(states["rng_tracker_states"])
    return iteration


def _take_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """`optimizer.load_state_dict(loaded)`, for torch's Adam too: it counts steps in each parameter's state, where the
    core, which expects Transformer Engine's, looks for a loaded tensor."""
    if backend.setup().transformer_engine:
        optimizer.load_state_dict(loaded)
        return
    chained = optimizer.chained_optimizers
    tensors = [(loaded if len(chained) == 1 else loaded[i]).pop("param_state") for i in range(len(chained))]
    optimizer.load_state_dict(loaded)
    for each, found in zip(chained, tensors, strict=True):
        states = each.optimizer.state.values()
        counts = [state.pop("step") for state in states]
        each.load_parameter_state_from_fully_reshardable(found)
        for state, count in zip(states, counts, strict=True):
            state["step"] = count


def _random_state() -> Any:
    """State dict that Megatron-LM asks for, without expert parallelism."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    shape = (ps.get_pipeline_model_parallel_world_size(), ps.get_tensor_model_parallel_world_size())
    place = (ps.get_pipeline_model_parallel_rank(), ps.get_tensor_model_parallel_rank())
    return ShardedObject("rng_state", [None], shape, place, replica_id=0)
