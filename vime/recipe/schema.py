"""The typed recipe: groups of options, every option spelled as its flag (`lr_decay_style` is `--lr-decay-style`).

A flag belongs to exactly one group, so a flat command line or a flat YAML mapping names it without its group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from vime.recipe import algorithms
from vime.recipe.algorithms import CORRECTIONS, ESTIMATORS, POLICY_LOSSES, Column, KLType
from vime.recipe.optimizers import OptimizerKind, optimizer_kind
from vime.recipe.sampling import SamplingSettings


def _name_in(table: Mapping[str, object]) -> AfterValidator:
    """Accepts the names of a table and plug-ins."""

    def check(name: str) -> str:
        if name not in table and not algorithms.is_plugin(name):
            raise PydanticCustomError(
                "name", "give one of {known}, or package.module:function", {"known": ", ".join(table)}
            )
        return name

    return AfterValidator(check)


EstimatorName = Annotated[str, _name_in(ESTIMATORS)]
PolicyLossName = Annotated[str, _name_in(POLICY_LOSSES)]
CorrectionName = Annotated[str, _name_in(CORRECTIONS)]


class Options(BaseModel):
    """Base of the groups: frozen, strict about names, documented by the strings below the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SourceOptions(Options):
    """Where models and data come from."""

    fetch: dict[str, str] = Field(default_factory=dict)
    """Folder in `$BASE_DIR`: repository of the Hub (`owner/name` or `datasets/owner/name`, with `@revision`)."""


class ModelOptions(Options):
    """Which model; its numbers come from the checkpoint's `config.json` or, without one, from `configs/models/`."""

    model: str | None = None
    """Name of a file in `configs/models/` (an HF `config.json` as YAML), used where no checkpoint is at hand."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Megatron model flags given by hand (`--rotary-base 10000`); one that differs from the checkpoint is an error."""
    mtp_num_layers: int = 0
    """Multi-token-prediction layers that are trained; 0 keeps the checkpoint's frozen."""
    bf16: bool = True
    """Train in bf16 with fp32 master weights; `--no-bf16` trains in fp32."""


class ResourceOptions(Options):
    """How many nodes and accelerators ("GPU slots" on machines without any) the actors take."""

    actor_num_nodes: int = 1
    """Nodes of the trainer."""
    actor_num_gpus_per_node: int = 8
    """GPUs, so trainer ranks, on each of them."""
    device: Literal["gpu", "cpu"] = "gpu"
    """`cpu`: slots are shares of the processors, and no GPUs are asked for, whatever the nodes have."""
    rollout_num_gpus: int | None = None
    """GPUs of all engines together; with `--colocate` always those of the trainer."""
    colocate: bool = False
    """Trainer and engines take turns on the same GPUs."""
    num_cpus_per_rank: int | None = None
    """CPU cores a trainer rank; by default the node's cores divided by its ranks."""


class CheckpointOptions(Options):
    """Where weights come from and go to."""

    hf_checkpoint: str | None = None
    """HF folder that the engine loads; gives tokenizer and `quantization_config` too."""
    ref_load: str | None = None
    """torch_dist folder of the reference model and of the start; made by the conversion stage when missing."""
    load: str | None = None
    """Checkpoint folder to resume from; without a tracker file in it the start is `--ref-load`, iteration 0. An HF
    folder is a start without a conversion, and `--save` what is resumed from."""
    start_from: str | None = None
    """HF folder (fp8 or bf16) that training starts from without a conversion; `--load` of such a folder means this."""
    save: str | None = None
    """Checkpoint folder; by default `checkpoints` in the run folder."""
    save_interval: int | None = None
    """Rollouts between two checkpoints; the last rollout is always saved when `--save` is set."""
    save_keep: int = 2
    """Newest checkpoints that are kept."""
    save_hf: str | None = None
    """HF folder, `{rollout_id}` replaced, written beside every checkpoint."""
    async_save: bool = False
    """Write checkpoints while training goes on."""
    conversion: Literal["one-pass", "two-stage", "direct"] = "one-pass"
    """fp8 to torch_dist in one pass; or cast and conversion as two stages; or straight from the HF folder at start."""
    convert_tensor_model_parallel_size: int = 1
    convert_pipeline_model_parallel_size: int = 1
    convert_expert_model_parallel_size: int = 1
    convert_expert_tensor_parallel_size: int = 1
    convert_decoder_first_pipeline_num_layers: int | None = None
    convert_decoder_last_pipeline_num_layers: int | None = None
    convert_num_nodes: int = 1
    """Nodes of the conversion stage."""
    convert_ranks_per_node: int = 1
    """Ranks of the conversion stage on each of them."""


class PerfOptions(Options):
    """Parallel sizes, recompute, batch sizes of the trainer."""

    tensor_model_parallel_size: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    decoder_first_pipeline_num_layers: int | None = None
    decoder_last_pipeline_num_layers: int | None = None
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = None
    use_dynamic_batch_size: bool = False
    """Pack samples into micro-batches of up to CP x `--max-tokens-per-gpu` tokens."""
    max_tokens_per_gpu: int | None = None
    log_probs_max_tokens_per_gpu: int | None = None
    """The same for forward-only passes; by default `--max-tokens-per-gpu`."""
    micro_batch_size: int = 1
    """Samples a micro-batch without `--use-dynamic-batch-size`."""

    @property
    def forward_tokens_per_gpu(self) -> int | None:
        """Tokens of a micro-batch on one GPU in forward-only passes; None: unlimited."""
        return self.log_probs_max_tokens_per_gpu or self.max_tokens_per_gpu


class RolloutOptions(Options):
    """Data, sampling and rewards."""

    prompt_data: list[str] = Field(default_factory=list)
    """Training prompts: a file, a folder of shards or a saved dataset; several sets as `name=path:weight …`."""
    input_key: str = "prompt"
    """Column of the prompt; a path (`a.b`) reaches a nested one, also in `--label-key` and `--metadata-key`."""
    label_key: str = "label"
    metadata_key: str = "metadata"
    apply_chat_template: bool = False
    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, in training and evaluation: `'{"enable_thinking": false}'`."""
    rollout_shuffle: bool = False
    rollout_seed: int = 42
    rm_type: str | None = None
    """`deepscaler`, `math`, `dapo`, `f1`, `gpqa`, `remote`, or `package.module:function`."""
    rm_url: str | None = None
    """Address of the reward server of `--rm-type remote`."""
    rm_timeout: float = 10.0
    """Seconds for the reward of one sample."""
    num_rollout: int = 1
    rollout_batch_size: int = 32
    """Groups a rollout gives to training."""
    n_samples_per_prompt: int = 8
    rollout_max_prompt_len: int | None = None
    """Longer training prompts are left out and counted."""
    rollout_max_response_len: int = 1024
    rollout_temperature: float = 1.0
    rollout_top_p: float = 1.0
    rollout_top_k: int = -1
    rollout_sample_seeds: bool = True
    """Give every request a seed that follows from `--rollout-seed` and the sample's number, so that a rollout can be
    repeated as far as vLLM computes the same numbers; costs vLLM one small kernel a request and token."""
    rollout_stop: list[str] = Field(default_factory=list)
    rollout_stop_token_ids: list[int] = Field(default_factory=list)
    over_sampling_batch_size: int | None = None
    """Prompts submitted at a time until the batch is full; by default `--rollout-batch-size`."""
    dynamic_sampling_filter_path: str | None = None
    """`package.module:function` or a built-in name (`check_reward_nonzero_std`) that keeps or drops a group."""
    partial_rollout: bool = False
    """Keep aborted samples and continue them in the next rollout."""
    mask_offpolicy_in_partial_rollout: bool = False
    max_staleness: int = 2
    """Rollouts that a token's weights may be behind the trainer's when it trains on it: samples with older ones are
    generated anew. Without `--colocate`, engines generate one rollout ahead of training unless this is 0."""
    num_steps_per_rollout: int | None = None
    """Optimizer steps a rollout; the global batch follows."""
    global_batch_size: int | None = None
    """Samples an optimizer step; the steps follow."""
    rollout_timeout: float = 3600.0
    """Seconds after which a rollout that is not full ends with an error."""

    @field_validator("prompt_data", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    @property
    def samples(self) -> int:
        """Samples that a rollout gives to training."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def steps(self) -> int:
        """Optimizer steps a rollout; one where neither the steps nor the global batch is given."""
        if self.num_steps_per_rollout is not None:
            return self.num_steps_per_rollout
        return self.samples // self.global_batch_size if self.global_batch_size else 1


class EvalOptions(Options):
    """Evaluation on held-out sets."""

    eval_interval: int | None = None
    """Rollouts between two evaluations; also before the first."""
    eval_prompt_data: list[str] = Field(default_factory=list)
    """Name and path in turn: `aime /data/aime-2024.jsonl`."""
    n_samples_per_eval_prompt: int = 1
    eval_max_prompt_len: int | None = None
    """Longer evaluation prompts are left out and counted; by default as long as the engines' context."""
    eval_max_response_len: int | None = None
    eval_temperature: float | None = None
    eval_top_p: float | None = None
    eval_top_k: int | None = None


class AlgorithmOptions(Options):
    """Advantages, policy loss and KL."""

    loss_type: Literal["policy_loss", "sft_loss"] = "policy_loss"
    advantage_estimator: EstimatorName = "grpo"
    """A name of `vime.recipe.algorithms.ESTIMATORS`, or `package.module:function`."""
    policy_loss_type: PolicyLossName | None = None
    """A name of `vime.recipe.algorithms.POLICY_LOSSES`, or `package.module:function`; by default the estimator's."""
    use_kl_loss: bool = False
    kl_loss_coef: float = 0.0
    kl_loss_type: KLType = "low_var_kl"
    kl_coef: float = 0.0
    """Weight of the KL in the reward."""
    kl_reward_type: KLType = "k1"
    """Estimate of the KL in the reward."""
    entropy_coef: float = 0.0
    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    eps_clip_c: float | None = None
    """Dual clip; greater than 1."""
    calculate_per_token_loss: bool = False
    constant_loss_length: int | None = None
    """Divide each sample's summed loss by this number of tokens instead of its own (Dr.GRPO)."""
    disable_grpo_std_normalization: bool = False
    """GRPO's advantages are not divided by the group's standard deviation (Dr.GRPO)."""
    use_tis: bool = False
    """Truncated importance sampling: `tis` of `--mismatch-correction`."""
    mismatch_correction: list[CorrectionName] = Field(default_factory=list)
    """Weights against the mismatch of trainer and engine, multiplied: names of
    `vime.recipe.algorithms.CORRECTIONS`, or `package.module:function`."""
    tis_clip: float = 2.0
    """Largest weight of `tis` and `seq_tis`; `icepop` and `seq_mis` give 0 to ratios above."""
    tis_clip_low: float = 0.0
    """Smallest weight of `tis` and `seq_tis`; `icepop` and `seq_mis` give 0 to ratios below."""
    geo_mask_low: float = 0.99
    """Smallest geometric mean of a sample's ratios that `geo_mask` keeps."""
    geo_mask_high: float = 1.01
    opsm_delta: float = 1e-4
    """Nats a token from which `opsm` masks samples with a negative advantage."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs for those of the old policy, which saves a forward pass a rollout."""
    overlong_buffer_len: int | None = None
    """Tokens before `--rollout-max-response-len` over which the reward falls (DAPO's soft overlong punishment)."""
    overlong_penalty_factor: float = 1.0
    """Reward that a response of full length loses."""
    normalize_advantages: bool = False
    """Whiten the advantages of all estimators over the rollout; REINFORCE++ always does."""
    normalize_advantages_over: Literal["tokens", "samples"] = "tokens"
    """What counts once in the mean and deviation of that: each trained token, or each sample."""

    @property
    def corrections(self) -> tuple[str, ...]:
        """Names of the mismatch corrections, each once."""
        return tuple(dict.fromkeys([*(["tis"] if self.use_tis else []), *self.mismatch_correction]))

    @property
    def needed_columns(self) -> frozenset[Column]:
        """Log-probs that the loss cannot do without."""
        if self.loss_type == "sft_loss":
            return frozenset()
        chosen = algorithms.estimator(self.advantage_estimator)
        loss = algorithms.policy_loss(self.policy_loss_type, self.advantage_estimator)
        found: set[Column] = {*chosen.columns, *loss.columns}
        if self.use_kl_loss:
            found.add("reference")
        if self.kl_coef:
            found |= {"old", "reference"}
        if self.corrections or self.use_rollout_logprobs:
            found.add("rollout")
        return frozenset(found)


class OptimizerOptions(Options):
    """Megatron's optimizer flags."""

    optimizer: str = "adam"
    lr: float = 1e-6
    min_lr: float = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_iters: int = 0
    lr_decay_iters: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    optimizer_cpu_offload: bool = False
    overlap_cpu_optimizer_d2h_h2d: bool = False
    use_precision_aware_optimizer: bool = False

    @field_validator("optimizer")
    @classmethod
    def _known(cls, value: str) -> str:
        return optimizer_kind(value).name

    @property
    def kind(self) -> OptimizerKind:
        """The tensors that the optimizer keeps, and their bytes."""
        return optimizer_kind(self.optimizer)


class EngineOptions(Options):
    """The vLLM engines."""

    rollout_num_gpus_per_engine: int = 1
    vllm_server_concurrency: int = 512
    """Requests under way at once, a server."""
    update_weight_buffer_size: int = 512 * 2**20
    """Bytes of one weight-sync bucket."""
    check_weight_sync: int = 0
    """Every N rollouts sync twice, with all weights zeroed between, and compare the engines' checksums; 0 never."""
    max_engine_restarts: int = 3
    """Times that an engine which fails is restarted within one rollout, before the run ends with its failure."""
    max_logprob_difference: float | None = None
    """Mean difference, in nats, of an engine's log-probs from the trainer's above which it is not used; by default
    0.1, and 0.5 for weights that were trained and then quantised."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Every other `--vllm-…` flag under vLLM's own name (`enable_expert_parallel: true`)."""


class MiscOptions(Options):
    """Other Megatron flags, seeds and what is written where."""

    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    accumulate_allreduce_grads_in_fp32: bool = False
    attention_softmax_in_fp32: bool = False
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    moe_enable_deepep: bool = False
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    seed: int = 1234
    use_wandb: bool = False
    wandb_project: str | None = None
    save_debug_rollout_data: bool = False
    """Write every rollout's samples to the run folder."""
    load_debug_rollout_data: str | None = None
    """Folder of rollouts that `--save-debug-rollout-data` wrote (`RUN/rollouts`): train on them, without engines."""
    debug_rollout_only: bool = False
    """Generate, score and write rollouts with the engines' own weights, without a trainer."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of every stage."""


class Recipe(BaseModel):
    """Everything a person decides about a run, besides the cluster it runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: SourceOptions = SourceOptions()
    model: ModelOptions = ModelOptions()
    resources: ResourceOptions = ResourceOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    perf: PerfOptions = PerfOptions()
    rollout: RolloutOptions = RolloutOptions()
    eval: EvalOptions = EvalOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    engine: EngineOptions = EngineOptions()
    misc: MiscOptions = MiscOptions()

    @property
    def needs_reference(self) -> bool:
        """A copy of the reference model is kept for its log-probs, which a KL needs."""
        return "reference" in self.algorithm.needed_columns

    @property
    def sampling(self) -> SamplingSettings:
        """Sampling of the rollouts."""
        rollout = self.rollout
        return SamplingSettings(
            max_tokens=rollout.rollout_max_response_len,
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            top_k=rollout.rollout_top_k,
            stop=tuple(rollout.rollout_stop),
            stop_token_ids=tuple(rollout.rollout_stop_token_ids),
        )

    @property
    def eval_sampling(self) -> SamplingSettings:
        """Sampling of the evaluations: what `--eval-…` does not say is as in training."""
        own = {
            "max_tokens": self.eval.eval_max_response_len,
            "temperature": self.eval.eval_temperature,
            "top_p": self.eval.eval_top_p,
            "top_k": self.eval.eval_top_k,
        }
        return dataclasses.replace(self.sampling, **{name: value for name, value in own.items() if value is not None})
