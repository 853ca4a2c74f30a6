"""The typed recipe: groups of options, each spelled as its flag (`lr_decay_style` is `--lr-decay-style`).

An option belongs to exactly one group, so a flat command line or a flat YAML mapping names it without its group. The
string below an option is its help text; its type and bounds are checked when the recipe is read.

One module since it is one table: every option of a recipe, by group.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from vime.recipe import algorithms
from vime.recipe.algorithms import CORRECTIONS, ESTIMATORS, POLICY_LOSSES, Column, KLType
from vime.recipe.optimizers import OptimizerKind, optimizer_kind
from vime.recipe.sampling import SamplingSettings

# Plug-ins of pydantic have no say in a recipe, and the search for them reads the metadata of every installed package.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")


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


def _json(value: Any) -> Any:
    """Value of a text in JSON; the text itself where it is none, and any other value."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Options(BaseModel):
    """Base of the groups: frozen, strict about names, documented by the strings below the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@functools.cache
def help_texts(options: type[BaseModel]) -> dict[str, str]:
    """Option -> the string below it, on one line. Read from the source on demand: pydantic would at every import."""
    (group,) = ast.parse(inspect.getsource(options)).body
    assert isinstance(group, ast.ClassDef)
    found = {}
    for field, text in itertools.pairwise(group.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found


class SourceOptions(Options):
    """Sources of models and data."""

    fetch: dict[str, str] = Field(default_factory=dict)
    """Downloads of `vime fetch`: folder -> repository of the Hub (`owner/name` or `datasets/owner/name`, optionally
    with `@revision`)."""


class ModelOptions(Options):
    """The model. Its sizes come from the checkpoint's `config.json`, or from `configs/models/` without a checkpoint."""

    model: str | None = None
    """File in `configs/models/` (a `config.json` as YAML), read where the checkpoint is not at hand."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Megatron model flags given by hand (`--rotary-base 10000`). One that contradicts the checkpoint is an error."""
    mtp_num_layers: int = Field(default=0, ge=0)
    """Multi-token-prediction layers to train as drafts of the policy, without a gradient to it; 0 keeps those of the
    checkpoint frozen."""
    bf16: bool = True
    """Train in bf16 with fp32 master weights; `--no-bf16` trains in fp32."""


class ResourceOptions(Options):
    """Nodes and accelerators of trainer and engines. On machines without GPUs a slot is a share of the processors."""

    actor_num_nodes: int = 1
    """Nodes of the trainer."""
    actor_num_gpus_per_node: int = 8
    """GPUs of the trainer on each of its nodes: one Megatron rank each."""
    device: Literal["gpu", "cpu"] = "gpu"
    """`cpu` asks Slurm for no GPUs and divides the processors instead."""
    rollout_num_gpus: int | None = Field(default=None, ge=1)
    """GPUs of all engines together. With `--colocate` these are the trainer's."""
    colocate: bool = False
    """Run engines on the trainer's GPUs; the two take turns."""
    num_cpus_per_rank: int | None = Field(default=None, ge=1)
    """CPU cores per trainer rank. Default: the node's cores divided by its ranks."""


class CheckpointOptions(Options):
    """Where weights are read and written."""

    hf_checkpoint: str | None = None
    """HF folder with the engines' first weights, the tokenizer and `quantization_config`."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint, for a tokenizer or model that needs it. Read that code first."""
    ref_load: str | None = None
    """torch_dist folder with the reference model and the first weights; the conversion stage makes a missing one."""
    load: str | None = None
    """Folder to resume from; one without a checkpoint starts at `--ref-load`. An HF folder starts training there
    without a conversion, and the run resumes from `--save`."""
    start_from: str | None = None
    """HF folder (fp8 or bf16) to start from without a conversion; the same as `--load` of such a folder."""
    save: str | None = None
    """Folder for checkpoints. Default: `checkpoints` in the run folder."""
    save_interval: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rollouts between checkpoints. `auto`: from the time of a save and the cluster's rate of failures. The last
    rollout is always saved."""
    save_keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep."""
    save_hf: str | None = None
    """HF folder written from every checkpoint, beside training; `{rollout_id}` in the path becomes the rollout's
    number."""
    async_save: bool = False
    """Write checkpoints in the background while training continues."""
    conversion: Literal["one-pass", "two-stage", "direct"] = "one-pass"
    """Way to the first weights: fp8 to torch_dist in one pass, a bf16 copy first (`two-stage`), or no conversion."""
    convert_tensor_model_parallel_size: int = 1
    """Tensor-parallel size of the converted checkpoint. It loads at any other layout too."""
    convert_pipeline_model_parallel_size: int = 1
    """Pipeline stages of the conversion."""
    convert_expert_model_parallel_size: int = 1
    """Expert-parallel size of the conversion."""
    convert_expert_tensor_parallel_size: int = 1
    """Expert tensor-parallel size of the conversion."""
    convert_decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage of the conversion. Default: an even share."""
    convert_decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage of the conversion. Default: an even share."""
    convert_num_nodes: int = Field(default=1, ge=1)
    """Nodes of the conversion stage."""
    convert_ranks_per_node: int = Field(default=1, ge=1)
    """Processes of the conversion stage per node."""


class PerfOptions(Options):
    """The trainer's parallel layout, recomputation and micro-batches."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices; they stay inside a node."""
    sequence_parallel: bool = False
    """Divide activations between tensor-parallel ranks by sequence; required with experts or latent attention."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages, each with a range of the layers."""
    context_parallel_size: int = 1
    """Ranks that share each sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each layer."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share the matrices of each expert."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage. Default: an even share."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage. Default: an even share."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activations to recompute in the backward pass: whole layers (`full`), or attention alone (`selective`)."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With `full`: all layers in groups (`uniform`), or only the first layers of a stage (`block`)."""
    recompute_num_layers: int | None = Field(default=None, ge=1)
    """Layers per recomputed group (`uniform`), or recomputed layers per stage (`block`)."""
    use_dynamic_batch_size: bool = False
    """Pack samples into micro-batches of up to context-parallel size x `--max-tokens-per-gpu` tokens."""
    max_tokens_per_gpu: int | None = Field(default=None, ge=1)
    """Tokens per GPU of a packed micro-batch. A longer sample gets a micro-batch of its own, uncut."""
    log_probs_max_tokens_per_gpu: int | None = Field(default=None, ge=1)
    """The same for forward-only passes. Default: `--max-tokens-per-gpu`."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Samples per micro-batch without `--use-dynamic-batch-size`."""

    @property
    def forward_tokens_per_gpu(self) -> int | None:
        """Tokens of a micro-batch on one GPU in forward-only passes; None: unlimited."""
        return self.log_probs_max_tokens_per_gpu or self.max_tokens_per_gpu


class RolloutOptions(Options):
    """Data, sampling and rewards."""

    prompt_data: list[str] = Field(default_factory=list)
    """Training prompts: a file, a folder of shards or a saved dataset; several sets as `name=path:weight …`."""
    input_key: str = "prompt"
    """Column of the prompt, text or chat messages; a path (`a.b`) reaches a nested one, as with the other keys."""
    label_key: str = "label"
    """Column of the label that the reward compares with; nested fields as in `--input-key`."""
    metadata_key: str = "metadata"
    """Column of a mapping that reaches the reward with the sample."""
    apply_chat_template: bool = False
    """Render prompts with the tokenizer's chat template."""
    apply_chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template, for training and evaluation: `{"enable_thinking": false}`."""
    rollout_shuffle: bool = False
    """Shuffle the prompts of every epoch, in an order that `--rollout-seed` decides."""
    rollout_seed: int = 42
    """Seed of the prompt order and of sampling."""
    rm_type: str | None = None
    """Reward: `deepscaler`, `math`, `dapo`, `f1`, `gpqa`, `remote`, or a function as `package.module:function`."""
    rm_url: str | None = None
    """Address of the reward server, with `--rm-type remote`."""
    rm_timeout: float = Field(default=10.0, gt=0)
    """Seconds for the reward of one sample."""
    rm_patience: float = Field(default=900.0, gt=0)
    """Seconds that groups wait for a reward server that is away; then the run ends with a cause that requeues."""
    skip_settled: int = Field(default=0, ge=0)
    """Turns that a prompt misses after a group whose rewards were all equal; 0 takes every prompt."""
    curriculum: str | None = None
    """`package.module:function` that gives visited prompts, by their rewards so far, a chance from 0 to 1."""
    num_rollout: int = Field(default=1, ge=0)
    """Rollouts of the run."""
    rollout_batch_size: int = Field(default=32, ge=1)
    """Groups (prompts) per rollout that training receives."""
    n_samples_per_prompt: int = Field(default=8, ge=1)
    """Samples per prompt: the size of a group."""
    rollout_max_prompt_len: int | None = Field(default=None, ge=1)
    """Longest prompt in tokens; longer ones are left out of training and counted."""
    rollout_max_response_len: int = Field(default=1024, ge=1)
    """Longest response in tokens."""
    rollout_temperature: float = 1.0
    """Sampling temperature; training computes log-probs at the same one."""
    rollout_top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling: smallest set of tokens with this probability. 1 keeps all."""
    rollout_top_k: int = Field(default=-1, ge=-1)
    """Number of most likely tokens to sample from. -1 keeps all."""
    rollout_sample_seeds: bool = True
    """Seed every request from `--rollout-seed` and the sample's index, so that a rollout can be repeated as far as
    vLLM computes the same numbers. Costs vLLM one small kernel per request and token."""
    rollout_stop: list[str] = Field(default_factory=list)
    """Texts that end a response."""
    rollout_stop_token_ids: list[int] = Field(default_factory=list)
    """Tokens that end a response, besides the end of text."""
    over_sampling_batch_size: int | None = Field(default=None, ge=1)
    """Prompts submitted at a time until the batch is full. Default: `--rollout-batch-size`."""
    dynamic_sampling_filter_path: str | None = None
    """Filter that keeps or drops a group: `check_reward_nonzero_std`, or a function as `package.module:function`."""
    partial_rollout: bool = False
    """Continue samples that a full batch aborted in the next rollout."""
    mask_offpolicy_in_partial_rollout: bool = False
    """Train a continued sample only on the tokens of its last rollout."""
    max_staleness: int = Field(default=2, ge=0)
    """Rollouts by which the weights behind a token may lag the trainer's; samples with older tokens are generated
    again. Without `--colocate`, engines generate one rollout ahead of training unless this is 0."""
    num_steps_per_rollout: int | None = Field(default=None, ge=1)
    """Optimizer steps per rollout; the global batch size follows."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Samples per optimizer step; the number of steps follows."""
    rollout_timeout: float = Field(default=3600.0, gt=0)
    """Seconds after which a rollout that is not full ends the run with an error."""

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
        """Optimizer steps per rollout; one where neither the steps nor the global batch is given."""
        if self.num_steps_per_rollout is not None:
            return self.num_steps_per_rollout
        return self.samples // self.global_batch_size if self.global_batch_size else 1


class AgentOptions(Options):
    """Conversations of many turns, and the tools that they use."""

    custom_generate_function_path: str | None = None
    """`package.module:function` that holds each conversation: `async def generate(session, sample)`."""
    environment: str | None = None
    """Holder of conversations: `tools` (those of `--tools`), or a class as `package.module:Class`."""
    tools: list[str] = Field(default_factory=list)
    """Tools of `--environment tools`: `calculator`, `python`, or functions as `package.module:function`."""
    agent_processes: int | None = Field(default=None, ge=0)
    """Processes that run the function or the environment; 0: the driver's own event loop. Default: a quarter of the
    node's cores, from 2 to 16. The built-in tools run beside them."""
    max_turns: int = Field(default=16, ge=1)
    """Turns that the model may take in a conversation."""
    max_tokens_per_turn: int | None = Field(default=None, ge=1)
    """Longest turn in tokens. `--rollout-max-response-len` limits the whole conversation behind its prompt."""
    turn_timeout: float | None = Field(default=None, gt=0)
    """Seconds for one turn of the model; a conversation that needs more ends there, as truncated."""
    conversation_timeout: float | None = Field(default=None, gt=0)
    """Seconds for a whole conversation, tools included; one that needs more ends there, as truncated."""
    tool_timeout: float = Field(default=30.0, gt=0)
    """Seconds for one call of a tool."""
    tool_output_characters: int = Field(default=8000, ge=1)
    """Characters of a tool's output that the model gets to see."""
    tool_memory: int = Field(default=512 * 2**20, ge=2**24)
    """Bytes of memory, and of files, that one call of `python` may take."""
    tool_programs: int | None = Field(default=None, ge=1)
    """Programs of `python` that run at once on a node; the plan counts `--tool-memory` for each, and more than these
    wait. Default: two for each core of theirs, or 4 where the plan does not know a node's cores."""
    tool_cores: int | None = Field(default=None, ge=0)
    """Cores of every node that are set aside for the programs of `python`; engines and trainer count on the others. 0:
    programs share all cores. Default: an eighth of a node's cores, which is none of fewer than eight."""
    on_tool_failure: Literal["observe", "fail"] = "observe"
    """A tool that dies, hangs or raises: tell the model, or fail the sample, so that its group is not trained on."""
    on_template_divergence: Literal["count", "refuse"] = "count"
    """Reaction where the chat template would write a conversation's history otherwise once it goes on (a thought
    left out): count it as `rollout/template_divergence`, or end the run."""

    @property
    def runs_python(self) -> bool:
        """True if the model may run programs by the tool `python`."""
        return self.environment == "tools" and "python" in self.tools

    @property
    def holds(self) -> bool:
        """Whether conversations have more than one turn."""
        return self.custom_generate_function_path is not None or self.environment is not None


class EvalOptions(Options):
    """Evaluation on held-out sets."""

    eval_interval: int | None = Field(default=None, ge=1)
    """Rollouts between evaluations; the first one is before training."""
    eval_job: bool = False
    """Evaluate checkpoints in jobs of their own, beside training (docs/evaluation.md); the shape of a job is `eval-job`
    of the cluster profile."""
    eval_job_interval: int = Field(default=1, ge=1)
    """Checkpoints between two evaluations of `--eval-job`."""
    eval_prompt_data: list[str] = Field(default_factory=list)
    """Evaluation sets, a name and a path each: `aime /data/aime-2024.jsonl`."""
    n_samples_per_eval_prompt: int = Field(default=1, ge=1)
    """Samples per evaluation prompt."""
    eval_max_prompt_len: int | None = Field(default=None, ge=1)
    """Longest evaluation prompt in tokens; longer ones are left out and counted. Default: all that the engines take."""
    eval_max_response_len: int | None = Field(default=None, ge=1)
    """Longest evaluation response in tokens. Default: `--rollout-max-response-len`."""
    eval_temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature of evaluations; 0 is greedy. Default: `--rollout-temperature`."""
    eval_top_p: float | None = Field(default=None, gt=0, le=1)
    """Nucleus sampling of evaluations. Default: `--rollout-top-p`."""
    eval_top_k: int | None = Field(default=None, ge=-1)
    """Top-k sampling of evaluations. Default: `--rollout-top-k`."""


class AlgorithmOptions(Options):
    """Advantages, policy loss and KL."""

    loss_type: Literal["policy_loss", "sft_loss"] = "policy_loss"
    """Policy gradient, or supervised training on the responses."""
    advantage_estimator: EstimatorName = "grpo"
    """Estimator of the advantage: a built-in one (docs/training.md has the formulas), or `package.module:function`."""
    policy_loss_type: PolicyLossName | None = None
    """Policy loss: a built-in one, or `package.module:function`. Default: the estimator's."""
    use_kl_loss: bool = False
    """Add the KL to the reference model to the loss; keeps a copy of the reference."""
    kl_loss_coef: float = 0.0
    """Weight of the KL in the loss; 0 only measures it."""
    kl_loss_type: KLType = "low_var_kl"
    """Estimator of the KL in the loss, per token."""
    kl_coef: float = 0.0
    """Weight of the KL that is subtracted from the reward."""
    kl_reward_type: KLType = "k1"
    """Estimator of the KL in the reward, per token."""
    entropy_coef: float = 0.0
    """Weight of the entropy that is subtracted from the loss."""
    eps_clip: float = Field(default=0.2, ge=0)
    """Lower clip range of the probability ratio."""
    eps_clip_high: float | None = Field(default=None, ge=0)
    """Upper clip range of the probability ratio. Default: `--eps-clip`."""
    eps_clip_c: float | None = Field(default=None, gt=1)
    """Dual clip of the ratio for negative advantages."""
    calculate_per_token_loss: bool = False
    """Average the loss over tokens, not over each sample's mean."""
    constant_loss_length: int | None = Field(default=None, ge=1)
    """Divide each sample's summed loss by this number of tokens instead of its own (Dr.GRPO)."""
    disable_grpo_std_normalization: bool = False
    """GRPO's advantages are not divided by the group's standard deviation (Dr.GRPO)."""
    use_tis: bool = False
    """Truncated importance sampling: `tis` of `--mismatch-correction`."""
    mismatch_correction: list[CorrectionName] = Field(default_factory=list)
    """Weights against the mismatch of trainer and engine, multiplied: names of
    `vime.recipe.algorithms.CORRECTIONS`, or `package.module:function`."""
    tis_clip: float = Field(default=2.0, gt=0)
    """Largest weight of `tis` and `seq_tis`; `icepop` and `seq_mis` give 0 to ratios above."""
    tis_clip_low: float = Field(default=0.0, ge=0)
    """Smallest weight of `tis` and `seq_tis`; `icepop` and `seq_mis` give 0 to ratios below."""
    geo_mask_low: float = Field(default=0.99, ge=0)
    """Smallest geometric mean of a sample's ratios that `geo_mask` keeps."""
    geo_mask_high: float = Field(default=1.01, gt=0)
    """Largest geometric mean of a sample's ratios that `geo_mask` keeps."""
    opsm_delta: float = Field(default=1e-4, ge=0)
    """Nats a token from which `opsm` masks samples with a negative advantage."""
    use_rollout_logprobs: bool = False
    """Take the engine's log-probs for those of the old policy, which saves a forward pass a rollout."""
    use_routing_replay: bool = False
    """Send every token to the experts of the old log-probs' pass in all optimizer steps of its rollout."""
    use_rollout_routing_replay: bool = False
    """Send every token to the experts that the engine chose for it, in all of the trainer's passes over its rollout."""
    overlong_buffer_len: int | None = None
    """Tokens before `--rollout-max-response-len` over which the reward falls (DAPO's soft overlong punishment)."""
    overlong_penalty_factor: float = Field(default=1.0, ge=0)
    """Reward that a response of full length loses."""
    normalize_advantages: bool = False
    """Whiten the advantages of all estimators over the rollout; REINFORCE++ always does."""
    normalize_advantages_over: Literal["tokens", "samples"] = "tokens"
    """Unit of the mean and deviation of that whitening: each trained token, or each sample."""
    use_opd: bool = False
    """On-policy distillation: the log-probs that `--opd-teacher` gives to the sampled tokens are added to the
    advantages as the reverse KL from the student to the teacher."""
    opd_kl_coef: float = Field(default=1.0, ge=0)
    """Weight of that reverse KL in the advantages; 0 only measures it."""

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
        if self.use_opd:
            found |= set(algorithms.ADVANTAGE_TERMS["use_opd"].columns)
        if self.use_kl_loss:
            found.add("reference")
        if self.use_routing_replay:
            found.add("old")
        if self.kl_coef:
            found |= {"old", "reference"}
        if self.corrections or self.use_rollout_logprobs:
            found.add("rollout")
        return frozenset(found)


class TeacherOptions(Options):
    """The teacher of `--use-opd`, which engines of its own serve on GPUs that nothing else uses."""

    opd_teacher: str | None = None
    """HF folder of the teacher; its tokenizer must be the student's."""
    opd_teacher_num_gpus: int | None = Field(default=None, ge=1)
    """GPUs of all engines of the teacher together. Default: one engine's."""
    opd_teacher_num_gpus_per_engine: int = Field(default=1, ge=1)
    """GPUs of one engine of the teacher: its tensor-parallel size, times `data_parallel_size` of
    `--opd-teacher-vllm`."""
    opd_teacher_vllm: dict[str, Any] = Field(default_factory=dict)
    """vLLM's arguments of these engines under vLLM's own names (`gpu_memory_utilization=0.8`). None of `--vllm-…`
    reaches them."""
    opd_teacher_patience: float = Field(default=900.0, gt=0)
    """Seconds that samples wait for a teacher that is away or late; then the run ends with a cause that requeues."""

    @field_validator("opd_teacher_vllm", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """Values of `KEY=VALUE` are text."""
        return {key: _json(each) for key, each in value.items()} if isinstance(value, Mapping) else value


class OptimizerOptions(Options):
    """Megatron's optimizer."""

    optimizer: str = "adam"
    """Name of the optimizer."""
    lr: float = Field(default=1e-6, ge=0)
    """Learning rate after the warm-up."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay."""
    lr_warmup_iters: int = Field(default=0, ge=0)
    """Optimizer steps of the linear warm-up."""
    lr_decay_iters: int | None = Field(default=None, ge=1)
    """Optimizer step at which the decay ends. Default: the run's last step."""
    mtp_lr: float | None = Field(default=None, ge=0)
    """Learning rate of layers that `--mtp-num-layers` trains, with the same warm-up and decay. Default: `--lr`."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    adam_beta2: float = Field(default=0.98, ge=0, lt=1)
    """Decay of Adam's second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Term added to the denominator of Adam's step."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 never clips."""
    spike_guard: Literal["none", "skip", "rollback"] = "none"
    """`skip` drops optimizer steps whose gradient norm spikes. `rollback` undoes a rollout whose loss, gradient norm,
    log-prob difference or reward spikes: the run resumes from its newest checkpoint without those prompts."""
    spike_factor: float = Field(default=10.0, gt=1)
    """Spreads from the median of the last rollouts above which a value is a spike (docs/training.md)."""
    spike_limit: int = Field(default=3, ge=1)
    """Steps in a row that are skipped, and set-backs of a run, at most."""
    optimizer_cpu_offload: bool = False
    """Keep optimizer states in host memory and step there."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap the host step with its transfers; needs `--optimizer-cpu-offload`."""
    use_precision_aware_optimizer: bool = False
    """Use Megatron's precision-aware optimizer; always on with `--optimizer-cpu-offload`."""

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

    rollout_num_gpus_per_engine: int = Field(default=1, ge=1)
    """GPUs of one engine; its tensor-parallel size is this divided by `--vllm-data-parallel-size`."""
    vllm_server_concurrency: int = Field(default=512, ge=1)
    """Requests in flight per server."""
    update_weight_buffer_size: int = Field(default=512 * 2**20, ge=1)
    """Bytes of one bucket of the weight sync."""
    check_weight_sync: int = Field(default=0, ge=0)
    """Verify every Nth weight sync: zero all weights, sync again, compare the engines' checksums. 0 never does."""
    max_engine_restarts: int = Field(default=3, ge=0)
    """Restarts of a failing engine within one rollout before the run fails."""
    max_logprob_difference: float | None = Field(default=None, gt=0)
    """Largest mean difference in nats between an engine's log-probs and the trainer's; an engine above it is not used.
    Default: 0.1, or 0.5 for weights that were trained and then quantised."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Any other `--vllm-…` flag under vLLM's own name (`enable_expert_parallel: true`)."""


class MiscOptions(Options):
    """Other Megatron options, seeds, tracking and debugging."""

    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of attention weights."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of hidden states."""
    accumulate_allreduce_grads_in_fp32: bool = False
    """Accumulate and reduce gradients in fp32."""
    attention_softmax_in_fp32: bool = False
    """Compute the softmax of unfused attention in fp32."""
    attention_backend: Literal["auto", "flash", "fused", "unfused", "local"] = "auto"
    """Attention kernel of the trainer."""
    moe_enable_deepep: bool = False
    """Dispatch tokens to experts with DeepEP; needs `--moe-token-dispatcher-type flex`."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"
    """Exchange of tokens between expert-parallel ranks."""
    seed: int = 1234
    """Seed of the trainer."""
    use_wandb: bool = False
    """Send metrics to Weights & Biases, with the key of the environment or of `wandb login`."""
    wandb_project: str | None = None
    """Project. Default: vime."""
    wandb_entity: str | None = None
    """User or team that the project belongs to."""
    wandb_group: str | None = None
    """Group of runs."""
    wandb_name: str | None = None
    """Name of the run. Default: the run name."""
    wandb_tags: list[str] = Field(default_factory=list)
    """Tags of the run."""
    wandb_mode: Literal["online", "offline"] | None = None
    """`offline` writes to the run folder, for a later `wandb sync`. Default: $WANDB_MODE, then online."""
    use_mlflow: bool = False
    """Send metrics to MLflow."""
    mlflow_tracking_uri: str | None = None
    """Server or store of MLflow, without a password. Default: a file store in the run folder."""
    mlflow_experiment: str = "vime"
    """Experiment that gets the run."""
    save_debug_rollout_data: bool = False
    """Write the samples of every rollout to the run folder."""
    load_debug_rollout_data: str | None = None
    """Folder of rollouts that `--save-debug-rollout-data` wrote: train on these, without engines."""
    debug_rollout_only: bool = False
    """Generate, score and write rollouts, without a trainer."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment of every stage: `NAME=VALUE`."""


class ProfileOptions(Options):
    """Profiles of the trainer, and live numbers (docs/profiling.md)."""

    profile_ranks: list[int] = Field(default_factory=list)
    """Trainer ranks to profile: `0,8`. Each takes gigabytes of host memory, which are in the plan."""
    profile_rollouts: list[int] = Field(default_factory=list)
    """Rollouts whose training is profiled on these ranks."""
    profiler: Literal["torch", "nsys"] = "torch"
    """torch's profiler, or Nsight Systems, which must be installed on the nodes."""
    prometheus: bool = False
    """Show live numbers of trainer, nodes and engines to a Prometheus on the driver's node."""
    record_memory_history: bool = False
    """Record where GPU memory is allocated, for the snapshot that is written at an out-of-memory error."""

    @field_validator("profile_ranks", "profile_rollouts", mode="before")
    @classmethod
    def _commas(cls, value: Any) -> Any:
        words = value if isinstance(value, list) else [value]
        return [part for word in words for part in (word.split(",") if isinstance(word, str) else [word])]


class Recipe(BaseModel):
    """All that a person decides about a run, except the cluster that it runs on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: SourceOptions = SourceOptions()
    model: ModelOptions = ModelOptions()
    resources: ResourceOptions = ResourceOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    perf: PerfOptions = PerfOptions()
    rollout: RolloutOptions = RolloutOptions()
    agent: AgentOptions = AgentOptions()
    eval: EvalOptions = EvalOptions()
    algorithm: AlgorithmOptions = AlgorithmOptions()
    teacher: TeacherOptions = TeacherOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    engine: EngineOptions = EngineOptions()
    profile: ProfileOptions = ProfileOptions()
    misc: MiscOptions = MiscOptions()

    @property
    def needs_reference(self) -> bool:
        """A copy of the reference model is kept for its log-probs, which a KL needs."""
        return "reference" in self.algorithm.needed_columns

    @property
    def needs_teacher(self) -> bool:
        """Engines of a teacher score what is generated; rollouts that are read were scored when they were made."""
        return self.algorithm.use_opd and self.misc.load_debug_rollout_data is None

    @property
    def needs_reward(self) -> bool:
        """Training looks at rewards, so that there must be a `--rm-type`."""
        return self.algorithm.advantage_estimator != algorithms.PURE_DISTILLATION

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
