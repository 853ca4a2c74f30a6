"""Fills in derived values, refuses contradictions, and notes costs and surprises."""

from __future__ import annotations

from typing import Any

from vime.errors import BadInput
from vime.models.arguments import ignored_args
from vime.models.config import ModelConfig
from vime.planning import layout as placing
from vime.planning.engines import check_routes, check_values
from vime.planning.teacher import check_distillation
from vime.recipe.algorithms import CORRECTIONS
from vime.recipe.load import change
from vime.recipe.parallel import ParallelLayout
from vime.recipe.schema import Recipe
from vime.run.cores import programs_at_once, set_aside
from vime.run.plan import Cluster, context_length
from vime.run.profiles import check_profile
from vime.run.trackers import check_tracking


def with_nodes(recipe: Recipe, nodes: int | None, gpus_per_node: int, *, one_node: bool = False) -> Recipe:
    """The recipe on this many nodes in total (None: as given); the trainer gets those not taken by engines and teacher,
    or shares its `one_node` with them."""
    apart = 0 if one_node else placing.nodes_apart(recipe, gpus_per_node)
    if nodes is None:
        return recipe
    if nodes - apart < 1:
        who = "the teacher takes" if recipe.resources.colocate else "engines on GPUs of their own take"
        raise BadInput(f"--nodes is {nodes}: {who} {apart} nodes, give at least {apart + 1}")
    return change(recipe, resources={"actor_num_nodes": nodes - apart})


def derive(recipe: Recipe, config: ModelConfig, layout: ParallelLayout, run_dir: str, cpus: int | None) -> Recipe:
    """The recipe with all rule-based defaults filled in. Raises BadInput for contradictions."""
    rollout, evaluation, checkpoint = recipe.rollout, recipe.eval_sampling, recipe.checkpoint
    resources: dict[str, Any] = {}
    if recipe.resources.colocate:
        resources["rollout_num_gpus"] = layout.world_size
    if recipe.resources.num_cpus_per_rank is None and cpus:
        left = cpus - set_aside(recipe.agent, cpus)
        resources["num_cpus_per_rank"] = max(1, left // recipe.resources.actor_num_gpus_per_node)
    save = checkpoint.save or f"{run_dir}/checkpoints"
    return change(
        recipe,
        resources=resources,
        checkpoint={"save": save, "load": checkpoint.load or save},
        perf={"log_probs_max_tokens_per_gpu": recipe.perf.forward_tokens_per_gpu},
        rollout={
            **_batches(recipe),
            "over_sampling_batch_size": rollout.over_sampling_batch_size or rollout.rollout_batch_size,
        },
        eval={
            "eval_max_response_len": evaluation.max_tokens,
            "eval_temperature": evaluation.temperature,
            "eval_top_p": evaluation.top_p,
            "eval_top_k": evaluation.top_k,
        },
        algorithm={"eps_clip_high": _or(recipe.algorithm.eps_clip_high, recipe.algorithm.eps_clip)},
        engine={"vllm": _engine_arguments(recipe, config)[0]},
    )


def with_programs(recipe: Recipe, cluster: Cluster) -> Recipe:
    """The recipe with the number of programs of the tool `python` that run at once on a node of the cluster.

    Cores that a node shares with other jobs say nothing. Raises BadInput where programs take all cores.
    """
    if not recipe.agent.runs_python:
        return recipe
    cores = cluster.cpus_per_node if cluster.exclusive or cluster.one_machine else None
    return change(recipe, agent={"tool_programs": programs_at_once(recipe.agent, cores)})


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _batches(recipe: Recipe) -> dict[str, int]:
    """Samples per optimizer step and steps per rollout, each from the other."""
    rollout = recipe.rollout
    samples, steps, batch = rollout.samples, rollout.num_steps_per_rollout, rollout.global_batch_size
    given = f"--rollout-batch-size x --n-samples-per-prompt is {samples}"
    if steps is not None and (steps < 1 or samples % steps):
        raise BadInput(f"{given}, which --num-steps-per-rollout {steps} does not divide")
    if batch is not None and (batch < 1 or samples % batch):
        raise BadInput(f"{given}, which --global-batch-size {batch} does not divide")
    if steps is not None and batch is not None and steps * batch != samples:
        raise BadInput(f"{given}, not --num-steps-per-rollout {steps} x --global-batch-size {batch}: leave one out")
    return {"num_steps_per_rollout": rollout.steps, "global_batch_size": samples // rollout.steps}


def check(recipe: Recipe, config: ModelConfig, layout: ParallelLayout) -> None:
    """Raise BadInput for combinations that cannot run."""
    perf, rollout, evaluation = recipe.perf, recipe.rollout, recipe.eval
    if perf.use_dynamic_batch_size and not perf.max_tokens_per_gpu:
        raise BadInput("--use-dynamic-batch-size needs --max-tokens-per-gpu: give the tokens a GPU can hold")
    _check_optimizer(recipe)
    check_values(recipe.engine.vllm)
    if rollout.rollout_temperature <= 0:
        raise BadInput(
            f"--rollout-temperature is {rollout.rollout_temperature:g}: must be above 0, greedy sampling gives nothing "
            "to learn from"
        )
    if recipe.algorithm.loss_type == "policy_loss" and recipe.sampling.truncated and rollout.rollout_temperature != 1:
        given = "--rollout-top-p" if rollout.rollout_top_p < 1 else "--rollout-top-k"
        raise BadInput(
            f"{given} needs --rollout-temperature 1, here {rollout.rollout_temperature:g}: at any other, engines "
            "return log-probs over the tokens that remain, and the trainer's are over all"
        )
    _check_losses(recipe)
    check_distillation(recipe)
    check_routes(recipe, config)
    if perf.sequence_parallel and layout.tp == 1:
        raise BadInput("--sequence-parallel needs --tensor-model-parallel-size above 1: leave it out")
    if config.moe and layout.tp > 1 and not perf.sequence_parallel:
        raise BadInput("tensor parallelism with experts needs --sequence-parallel: give it")
    if perf.recompute_granularity == "full" and (perf.recompute_method is None or perf.recompute_num_layers is None):
        raise BadInput("--recompute-granularity full needs --recompute-method and --recompute-num-layers")
    if recipe.misc.debug_rollout_only and recipe.misc.load_debug_rollout_data:
        raise BadInput("--debug-rollout-only and --load-debug-rollout-data leave nothing to do: give one of them")
    if evaluation.eval_interval and not evaluation.eval_prompt_data:
        raise BadInput("--eval-interval needs --eval-prompt-data NAME PATH")
    _check_exports(recipe)
    check_tracking(recipe)
    check_profile(recipe, layout.world_size)
    if (rollout.over_sampling_batch_size or rollout.rollout_batch_size) < rollout.rollout_batch_size:
        raise BadInput(
            f"--over-sampling-batch-size {rollout.over_sampling_batch_size} is less than "
            f"--rollout-batch-size {rollout.rollout_batch_size}: give at least as much"
        )
    if recipe.misc.moe_enable_deepep and recipe.misc.moe_token_dispatcher_type != "flex":
        raise BadInput("--moe-enable-deepep needs --moe-token-dispatcher-type flex")
    if recipe.model.mtp_num_layers > config.mtp_layers:
        raise BadInput(
            f"--mtp-num-layers is {recipe.model.mtp_num_layers}, but the checkpoint has {config.mtp_layers} MTP layers"
        )
    longest = context_length(recipe, config)
    if longest <= rollout.rollout_max_response_len:
        which = "--vllm-max-model-len" if "max_model_len" in recipe.engine.vllm else "the model's length"
        raise BadInput(
            f"{which} {longest} leaves no room for a prompt next to "
            f"--rollout-max-response-len {rollout.rollout_max_response_len}"
        )


def _check_exports(recipe: Recipe) -> None:
    saved, interval = recipe.checkpoint.save_hf, recipe.checkpoint.save_interval
    if recipe.eval.eval_job and not recipe.eval.eval_prompt_data:
        raise BadInput("--eval-job needs --eval-prompt-data NAME PATH")
    often = interval == "auto" or (isinstance(interval, int) and interval < recipe.rollout.num_rollout)
    if saved and "{rollout_id}" not in saved and often:
        raise BadInput(
            f"--save-hf is {saved}, and --save-interval {interval} saves more than once: give {{rollout_id}} in it"
        )


def _check_optimizer(recipe: Recipe) -> None:
    options = recipe.optimizer
    if options.min_lr > options.lr:
        raise BadInput(f"--min-lr {options.min_lr} is above --lr {options.lr}: give a smaller one")
    if options.mtp_lr is not None and (not options.lr or not recipe.model.mtp_num_layers):
        raise BadInput("--mtp-lr needs --mtp-num-layers, and an --lr above 0 whose warm-up and decay it follows")
    end = options.lr_decay_iters or recipe.rollout.num_rollout * recipe.rollout.steps
    if options.lr_decay_style != "constant" and options.lr_warmup_iters >= end:
        raise BadInput(
            f"--lr-warmup-iters {options.lr_warmup_iters} leaves no step to decay in: the decay ends at optimizer step "
            f"{end} (--lr-decay-iters, by default --num-rollout x --num-steps-per-rollout)"
        )


def _check_losses(recipe: Recipe) -> None:
    algorithm = recipe.algorithm
    if algorithm.use_kl_loss and algorithm.kl_loss_type == "k1" and algorithm.kl_loss_coef:
        raise BadInput(
            "--kl-loss-type k1 cannot be trained on: the gradient of log p - log p_ref is that of log p, which is zero "
            "on average and pulls nowhere; give low_var_kl, k2 or k3, or --kl-loss-coef 0 to measure k1 only"
        )
    # Off-policy sequence masking compares with the current policy, not with the old one.
    idle = [name for name in algorithm.corrections if name in CORRECTIONS and name != "opsm"]
    if algorithm.use_rollout_logprobs and idle:
        raise BadInput(
            f"--use-rollout-logprobs leaves {', '.join(idle)} of --mismatch-correction nothing to correct: the old "
            "policy is the engine's then; give one of them"
        )
    if algorithm.use_rollout_logprobs and algorithm.use_routing_replay:
        raise BadInput(
            "--use-routing-replay replays the routes of the old log-probs' pass, which --use-rollout-logprobs leaves "
            "out: give one of them"
        )
    if algorithm.use_rollout_routing_replay and algorithm.use_routing_replay:
        raise BadInput(
            "--use-routing-replay replays the trainer's routes and --use-rollout-routing-replay the engine's: give one"
        )
    if algorithm.constant_loss_length is not None and algorithm.calculate_per_token_loss:
        raise BadInput("--constant-loss-length and --calculate-per-token-loss reduce the loss in two ways: give one")
    buffer, longest = algorithm.overlong_buffer_len, recipe.rollout.rollout_max_response_len
    if buffer is not None and not 0 < buffer <= longest:
        raise BadInput(f"--overlong-buffer-len is {buffer}: give 1 to {longest}, --rollout-max-response-len")
    if algorithm.tis_clip_low > algorithm.tis_clip:
        raise BadInput(f"--tis-clip-low {algorithm.tis_clip_low} is above --tis-clip {algorithm.tis_clip}")


def _engine_arguments(recipe: Recipe, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """vLLM's arguments, with its name for the speculative method of a model with built-in draft layers; and notes."""
    arguments = dict(recipe.engine.vllm)
    speculative = arguments.get("speculative_config")
    if not isinstance(speculative, dict) or speculative.get("method") not in ("eagle", "mtp"):
        return arguments, []
    if speculative["method"] == "mtp" and not config.mtp_layers:
        raise BadInput("--vllm-speculative-config asks for mtp, but the checkpoint has no MTP layer: leave it out")
    if speculative["method"] == "eagle" and not speculative.get("model"):
        if not config.mtp_layers:
            raise BadInput('--vllm-speculative-config with method "eagle" needs "model", the folder of the draft model')
        arguments["speculative_config"] = {**speculative, "method": "mtp"}
        return arguments, [
            '--vllm-speculative-config: method "eagle" is read as "mtp", the draft that the model brings'
        ]
    return arguments, []


def notes(recipe: Recipe, config: ModelConfig, layout: ParallelLayout) -> list[str]:
    """Notes for the user about the recipe as given."""
    optimizer, algorithm = recipe.optimizer, recipe.algorithm
    found = _engine_arguments(recipe, config)[1]
    found += ignored_args(recipe.model.model_args)
    if algorithm.use_kl_loss and algorithm.kl_loss_coef == 0:
        found.append(
            "--use-kl-loss with --kl-loss-coef 0 measures the KL only; it costs a copy of the reference model "
            "and a forward pass a rollout"
        )
    if optimizer.overlap_cpu_optimizer_d2h_h2d and not optimizer.optimizer_cpu_offload:
        found.append("--overlap-cpu-optimizer-d2h-h2d has no effect without --optimizer-cpu-offload")
    if recipe.eval.eval_job and recipe.eval.eval_interval:
        found.append("--eval-job evaluates checkpoints in jobs of their own; the loop's --eval-interval does not run")
    if recipe.perf.use_dynamic_batch_size and "micro_batch_size" in recipe.perf.model_fields_set:
        found.append("--micro-batch-size has no effect with --use-dynamic-batch-size")
    if config.mtp_layers and not recipe.model.mtp_num_layers:
        found.append(
            "the MTP layer is loaded, exported and synced, but not trained; --mtp-num-layers "
            f"{config.mtp_layers} trains it"
        )
    if algorithm.use_routing_replay and not config.moe:
        found.append("--use-routing-replay has no effect: the model has no experts")
    elif algorithm.use_routing_replay and recipe.rollout.steps == 1:
        found.append("--use-routing-replay changes nothing with one optimizer step a rollout, and costs a forward pass")
    if recipe.misc.moe_token_dispatcher_type == "flex" and not config.moe:
        found.append("--moe-token-dispatcher-type has no effect: the model has no experts")
    return found
