"""Flags and names of neighbouring trainers and of their launch scripts, and what stands for each of them here.

Three tables, by a flag's name with underscores: flags that have another name here, switches for what vime always does,
and flags that have no place here, each with its reason. Hints about unknown flags come from them first.
"""

from __future__ import annotations

ALWAYS_SO: dict[str, str] = {
    "balance_data": "the shares of the data-parallel ranks are always balanced by their cost",
    "use_distributed_optimizer": "optimizer states are always divided among data-parallel ranks",
    "use_mcore_models": "the model is always Megatron-core's",
    "use_flash_attn": "--attention-backend chooses the kernel",
    "use_slime_router": "requests go to the least loaded engine",
    "no_load_optim": "the first weights bring no optimizer state, and a resumed run needs its own",
    "no_load_rng": "random numbers follow from --seed and the rollout",
    "sglang_enable_metrics": "engines are always measured",
}
"""Switches for what vime always does: taken with a note that says so."""

NO_MATTER: frozenset[str] = frozenset({
    "ckpt_format", "ckpt_fully_parallel_load", "ckpt_fully_parallel_save", "distributed_timeout_minutes",
    "cross_entropy_fusion_impl", "cross_entropy_loss_fusion", "log_interval", "manual_gc", "manual_gc_interval",
    "moe_router_fusion",
    "moe_shared_expert_overlap", "moe_token_drop_policy", "overlap_grad_reduce", "overlap_param_gather",
    "no_bias_dropout_fusion", "no_bias_gelu_fusion", "no_bias_swiglu_fusion",
    "no_create_attention_mask_in_dataloader", "no_gradient_accumulation_fusion", "no_masked_softmax_fusion",
    "no_persist_layer_norm", "no_save_rng", "seq_length", "transformer_impl", "use_cpu_initialization",
    "use_dist_ckpt",
})  # fmt: skip
"""Megatron's flags of implementation, as model scripts give them: none changes what is computed here; vime chooses."""

RENAMED: dict[str, str] = {
    "actor_learning_rate": "lr",
    "learning_rate": "lr",
    "kl_coeff": "kl_coef",
    "init_kl_coef": "kl_coef",
    "entropy_coeff": "entropy_coef",
    "cliprange": "eps_clip",
    "clip_ratio_low": "eps_clip",
    "clip_ratio_high": "eps_clip_high",
    "train_batch_size": "global_batch_size",
    "prompt_batch_size": "rollout_batch_size",
    "n_samples": "n_samples_per_prompt",
    "temperature": "rollout_temperature",
    "top_p": "rollout_top_p",
    "top_k": "rollout_top_k",
    "max_new_tokens": "rollout_max_response_len",
    "max_response_len": "rollout_max_response_len",
    "max_response_length": "rollout_max_response_len",
    "generate_max_len": "rollout_max_response_len",
    "max_prompt_len": "rollout_max_prompt_len",
    "max_prompt_length": "rollout_max_prompt_len",
    "prompt_max_len": "rollout_max_prompt_len",
    "eval_max_context_len": "eval_max_prompt_len",
    "remote_rm_url": "rm_url",
    "reward_model_url": "rm_url",
    "custom_rm_path": "rm_type",
    "opd_teacher_load": "opd_teacher",
    "opd_teacher_model_name_or_path": "opd_teacher",
    "opd_teacher_hf_checkpoint": "opd_teacher",
    "teacher_model": "opd_teacher",
    "teacher_model_path": "opd_teacher",
    "kl_penalty_coef": "opd_kl_coef",
    "pretrain": "hf_checkpoint",
    "model_name_or_path": "hf_checkpoint",
    "model_path": "hf_checkpoint",
    "pretrained_checkpoint": "ref_load",
    "save_steps": "save_interval",
    "eval_steps": "eval_interval",
    "max_epochs": "num_rollout",
    "num_episodes": "num_rollout",
    "num_gpus_per_node": "actor_num_gpus_per_node",
    "gpus_per_node": "actor_num_gpus_per_node",
    "tp_size": "tensor_model_parallel_size",
    "tensor_parallel_size": "tensor_model_parallel_size",
    "pp_size": "pipeline_model_parallel_size",
    "cp_size": "context_parallel_size",
    "ep_size": "expert_model_parallel_size",
    "colocate_all_models": "colocate",
    "wandb_run_name": "wandb_name",
    "wandb_team": "wandb_entity",
    "wandb_exp_name": "wandb_name",
    "save_debug_train_data": "save_debug_rollout_data",
    "rollout_num_gpus_per_node": "actor_num_gpus_per_node",
    "update_weight_buffer_size_bytes": "update_weight_buffer_size",
    "sglang_mem_fraction_static": "vllm_gpu_memory_utilization",
    "sglang_server_concurrency": "vllm_server_concurrency",
    "sglang_context_length": "vllm_max_model_len",
    "sglang_max_running_requests": "vllm_max_num_seqs",
    "sglang_chunked_prefill_size": "vllm_max_num_batched_tokens",
    "sglang_dp_size": "vllm_data_parallel_size",
    "sglang_kv_cache_dtype": "vllm_kv_cache_dtype",
    "sglang_attention_backend": "vllm_attention_backend",
    "sglang_enable_ep_moe": "vllm_enable_expert_parallel",
    "sglang_disable_cuda_graph": "vllm_enforce_eager",
    "sglang_dtype": "vllm_dtype",
    "sglang_quantization": "vllm_quantization",
}
"""Flags that have another name here."""

NO_PLACE: dict[str, str] = {
    "opd_type": "the teacher is always served by vLLM engines of the plan: --opd-teacher",
    "opd_teacher_ckpt_step": "the teacher is an HF folder: --opd-teacher",
    "opd_log_prob_top_k": "not built: the reverse KL is that of the sampled tokens",
    "opd_teacher_tokenizer": "not built: the teacher has the student's tokenizer",
    "group_rm": "a reward of whole groups is --rm-type group:package.module:function",
    "wandb_key": "a key on a command line is seen by everyone on the machine: set WANDB_API_KEY or run wandb login",
    "wandb_api_key": "a key on a command line is seen by everyone on the machine: set WANDB_API_KEY or run wandb login",
    "wandb_host": "set WANDB_BASE_URL in the environment",
    "hf_token": "a key on a command line is seen by everyone on the machine: set HF_TOKEN or run hf auth login",
    "rollout_function_path": "not built: vime has one way to generate; rewards and filters are plug-ins",
    "buffer_filter_path": "not built: partial samples continue in the order of their prompts",
    "custom_config_path": "a recipe is the YAML file: --recipe FILE, before --",
    "config": "a recipe is the YAML file: --recipe FILE, before --",
    "node": "the number of nodes is --nodes, before --",
    "nodes": "the number of nodes is --nodes, before --",
    "nnodes": "the number of nodes is --nodes, before --",
    "num_nodes": "the number of nodes is --nodes, before --",
    "partition": "--partition stands before --",
    "dry_run": "--dry-run stands before --",
    "base_dir": "--base-dir stands before --",
    "run_name": "--run-name stands before --",
    "critic_num_nodes": "not built: there is no critic; the estimators need none",
    "critic_num_gpus_per_node": "not built: there is no critic; the estimators need none",
    "critic_learning_rate": "not built: there is no critic; the estimators need none",
    "num_critic_only_steps": "not built: there is no critic; the estimators need none",
    "value_clip": "not built: there is no critic; the estimators need none",
    "gamma": "not built: the reward of a response is not discounted",
    "lambd": "not built: there is no critic, so no generalised advantage",
    "use_dynamic_global_batch_size": "not built: --global-batch-size is fixed over a run",
    "offload": "with --colocate trainer and engines always free the GPU for each other",
    "offload_train": "with --colocate trainer and engines always free the GPU for each other",
    "offload_rollout": "with --colocate trainer and engines always free the GPU for each other",
    "train_backend": "not built: Megatron trains",
    "rollout_external": "not built: the run starts its own engines",
    "rollout_external_engine_addrs": "not built: the run starts its own engines",
    "hf_config_json": "the model is described by config.json in --hf-checkpoint",
    "megatron_to_hf_mode": "the family's table maps the names (docs/families.md)",
    "model_name": "the family follows from config.json in --hf-checkpoint",
    "tokenizer_model": "the tokenizer is the one in --hf-checkpoint",
    "tokenizer_type": "the tokenizer is the one in --hf-checkpoint",
    "lora_rank": "not built: all weights are trained",
    "use_fault_tolerance": "engines are always watched: --max-engine-restarts",
    "rollout_health_check_interval": "engines are always watched: --max-engine-restarts",
    "router_ip": "requests go to the engines directly",
    "router_port": "requests go to the engines directly",
    "use_tensorboard": "TensorBoard files are always written to the run folder",
    "tensorboard_dir": "TensorBoard files are always written to the run folder",
    "ray_address": "the allocation's own Ray is used",
    "master_addr": "the allocation decides where ranks meet",
    "master_port": "the allocation decides where ranks meet",
}
"""Flags without a place here: what to do instead, or `not built`."""

FILTERS: dict[str, str] = {
    "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": "check_reward_nonzero_std",
    "vime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std": "check_reward_nonzero_std",
}
"""Names of filters elsewhere, and here."""

REWARDS: dict[str, str] = {"remote_rm": "remote", "math_verify": "math", "dapo_math": "dapo"}
"""Names of rewards elsewhere, and here."""


def plug_in(value: str) -> str | None:
    """`package.module:function` for a dotted path of a plug-in, as other trainers write it; None for anything else."""
    module, dot, function = value.rpartition(".")
    parts = [*module.split("."), function]
    return f"{module}:{function}" if dot and all(part.isidentifier() for part in parts) else None


def advice(name: str) -> str | None:
    """One sentence about a neighbour's flag; None for a flag that no table knows."""
    if name in RENAMED:
        return f"here it is --{RENAMED[name].replace('_', '-')}"
    if name in NO_PLACE:
        return NO_PLACE[name]
    if name.startswith("sglang_"):
        return "vime generates with vLLM, whose arguments are --vllm-…"
    return None
