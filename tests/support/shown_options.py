"""Tests that show what an option does in a process that runs later: file below tests/, function, options."""

SHOWN_IN: dict[str, dict[str, tuple[str, ...]]] = {
    "agents/test_agents.py": {
        "test_a_function_that_blocks_its_process_is_ended_by_the_conversations_time": ("agent_processes",),
    },
    "agents/test_tools.py": {
        "test_a_failing_tool_may_fail_its_sample_instead": ("on_tool_failure",),
    },
    "e2e/test_debug_runs.py": {
        "test_a_rollout_without_a_trainer_is_trained_on_without_engines": (
            "debug_rollout_only",
            "load_debug_rollout_data",
        ),
    },
    "megatron/test_layouts.py": {
        "test_options_without_effect_on_a_cpu_are_named": ("moe_enable_deepep",),
        "test_replayed_routes_train_the_same_over_stages_and_experts_and_in_recomputation": ("use_routing_replay",),
    },
    "megatron/test_model.py": {
        "test_a_dispatcher_that_cannot_take_packed_micro_batches_through_a_pipeline_is_refused": (
            "moe_token_dispatcher_type",
        ),
        "test_every_option_of_the_full_recipe_reaches_megatron_on_a_gpu_and_is_spoken_of_on_a_cpu": (
            "attention_backend",
            "attention_softmax_in_fp32",
        ),
    },
    "megatron/test_optimizer.py": {
        "test_flags_of_the_host_optimizer_are_accepted_and_said_to_do_nothing_on_a_cpu": (
            "use_precision_aware_optimizer",
        ),
    },
    "megatron/test_resume.py": {
        "test_the_same_seed_and_layout_give_the_same_numbers_bit_for_bit": ("seed",),
    },
    "node/test_rehearsal.py": {
        "test_a_recipe_turns_libraries_on": ("optimizer",),
    },
    "observe/test_samples.py": {
        "test_what_was_written_for_a_report_is_not_taken_for_a_rollout": ("save_debug_rollout_data",),
    },
    "planning/test_evaluation.py": {
        "test_the_loop_leaves_evaluation_to_the_jobs_and_every_nth_checkpoint_has_one": ("eval_job_interval",),
    },
    "planning/test_plan_build.py": {
        "test_derived_values_are_filled_in": (
            "actor_num_nodes",
            "log_probs_max_tokens_per_gpu",
        ),
        "test_load_of_an_hf_folder_is_a_start_without_a_conversion": ("load",),
    },
    "planning/test_plan_layout.py": {
        "test_engines_apart_from_the_trainer_have_nodes_after_its_own": ("rollout_num_gpus",),
    },
    "rewards/test_rewards.py": {
        "test_a_curriculum_runs_in_a_worker_and_a_bad_one_is_named": ("curriculum",),
        "test_a_reward_server_that_stays_away_ends_the_run_with_a_cause_that_requeues": ("rm_patience",),
    },
    "rollout/test_conversation.py": {
        "test_history_that_the_template_would_write_otherwise_is_counted_or_refused": ("on_template_divergence",),
    },
    "rollout/test_data.py": {
        "test_text_and_chat_messages_are_read_with_label_and_metadata": ("apply_chat_template",),
    },
    "rollout/test_sampler.py": {
        "test_a_round_that_takes_too_long_ends_with_the_counts": ("rollout_timeout",),
        "test_answers_of_weights_that_are_too_old_are_generated_anew": ("max_staleness",),
        "test_evaluation_gives_mean_reward_and_pass_at_k_of_every_set": ("n_samples_per_eval_prompt",),
        "test_evaluation_measures_rows_that_training_leaves_out_and_counts_its_own": (
            "eval_max_prompt_len",
            "rollout_max_prompt_len",
        ),
        "test_settled_prompts_are_left_out_and_counted": ("skip_settled",),
        "test_the_order_of_prompts_depends_on_the_seed_alone_and_goes_on_exactly_after_a_resume": (
            "over_sampling_batch_size",
            "rollout_shuffle",
        ),
    },
    "run/test_cores.py": {
        "test_the_recipe_may_say_how_many": ("tool_cores",),
        "test_two_programs_run_at_once_for_each_core_of_theirs_unless_the_recipe_says_how_many": ("tool_programs",),
    },
    "test_fetch.py": {
        "test_brings_everything_once_and_checks_it_without_network": ("fetch",),
    },
    "train/test_options_later.py": {
        "test_from_where_on_a_value_is_a_spike": ("spike_factor",),
        "test_how_often_a_sync_is_checked": ("check_weight_sync",),
        "test_the_budget_of_a_conversation": (
            "conversation_timeout",
            "max_tokens_per_turn",
            "max_turns",
            "turn_timeout",
        ),
        "test_the_columns_of_the_rows": (
            "input_key",
            "label_key",
            "metadata_key",
        ),
        "test_the_limits_of_a_tool": (
            "tool_memory",
            "tool_output_characters",
            "tool_timeout",
        ),
        "test_the_requests_that_an_engine_gets_at_once": ("vllm_server_concurrency",),
        "test_the_seeds_of_samples": ("rollout_sample_seeds",),
        "test_the_threads_of_a_rank": ("num_cpus_per_rank",),
    },
    "train/test_spike_guard.py": {
        "test_a_spike_ends_the_attempt_and_leaves_its_prompts_out": ("spike_guard",),
        "test_after_the_limit_a_spike_is_printed_and_kept": ("spike_limit",),
    },
    "train/test_supervisor.py": {
        "test_an_engine_that_fails_too_often_ends_the_run_with_the_cause": ("max_engine_restarts",),
    },
    "train/test_trust.py": {
        "test_an_engine_at_the_bound_is_named_with_the_difference_and_the_bound": ("max_logprob_difference",),
    },
}
