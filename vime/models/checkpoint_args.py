"""Command-line arguments of Megatron-LM as its checkpoints hold them, for its `--load` and `--use-checkpoint-args`.

vime reads none of them back. Names and meaning follow `load_args_from_checkpoint` and `check_checkpoint_args` of
Megatron-LM's training/checkpointing.py at the pinned core's version.
"""

from __future__ import annotations

import argparse
from typing import Any

from vime.models.arguments import expected_args
from vime.models.config import ModelConfig
from vime.recipe.parallel import ParallelLayout

_PLAIN = (bool, int, float, str, list, type(None))


def checkpoint_args(
    config: ModelConfig,
    layout: ParallelLayout,
    *,
    mtp: bool,
    bf16: bool = True,
    global_batch_size: int | None = None,
    with_optimizer: bool = True,
) -> argparse.Namespace:
    """Arguments of a run of Megatron-LM that would have written a checkpoint of this model and layout.

    `mtp`: the checkpoint holds the multi-token-prediction layers. `global_batch_size`: samples of an optimizer step.
    """
    model = {name: value for name, value in expected_args(config).items() if isinstance(value, _PLAIN)}
    if config.moe is not None:
        model |= {"moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall"}
    values: dict[str, Any] = {
        **model,
        "mtp_num_layers": config.mtp_layers if mtp else None,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "padded_vocab_size": config.padded_vocab_size(layout.tp),
        "make_vocab_size_divisible_by": 1,
        "add_position_embedding": True,
        "rotary_interleaved": False,
        "squared_relu": False,
        "apply_layernorm_1p": False,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": bf16,
        "fp16": False,
        "world_size": layout.world_size,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": layout.cp,
        "data_parallel_size": layout.dp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "decoder_first_pipeline_num_layers": layout.first_stage_layers if layout.pp > 1 else None,
        "decoder_last_pipeline_num_layers": layout.last_stage_layers if layout.pp > 1 else None,
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": True,
        "ckpt_format": "torch_dist",
        "ckpt_fully_parallel_save": True,
        "use_dist_ckpt": True,
        "data_parallel_random_init": False,
        "global_batch_size": global_batch_size,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": not with_optimizer,
        "no_save_rng": not with_optimizer,
    }
    return argparse.Namespace(**values)
