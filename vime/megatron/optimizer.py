"""Megatron's distributed optimizer: data-parallel wrapping, Adam, learning rate, guarded steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vime.errors import BadInput, VimeError
from vime.megatron import backend
from vime.megatron.megatron_lm import optimizer_common, scheduler_state
from vime.observe.spikes import GRAD_NORM, Window
from vime.recipe.schema import OptimizerOptions, Recipe

MAX_SKIPPED_STEPS = 3
_NAMED_GRADIENTS = 3
_DRAFT = "mtp.layers."


class GradientsNotFinite(VimeError):
    """Gradients were not finite in several consecutive steps."""


def learning_rate(options: OptimizerOptions, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine to `min_lr`.

    Equals Megatron's OptimizerParamScheduler: the first warm-up step has rate 0. The decay ends at `lr_decay_iters`
    steps, by default at `total_steps`.
    """
    warmup, end = options.lr_warmup_iters, options.lr_decay_iters or total_steps
    if step < warmup:
        return options.lr * step / warmup
    if options.lr_decay_style == "constant":
        return options.lr
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    share = 1 - done if options.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return options.min_lr + (options.lr - options.min_lr) * share


def notes(options: OptimizerOptions, cpu: bool) -> list[str]:
    """Sentences about flags that are accepted but have no effect on this device."""
    flags = {
        "--optimizer-cpu-offload": options.optimizer_cpu_offload,
        "--overlap-cpu-optimizer-d2h-h2d": options.overlap_cpu_optimizer_d2h_h2d,
        "--use-precision-aware-optimizer": options.use_precision_aware_optimizer,
    }
    given = [flag for flag, on in flags.items() if on]
    return [f"{', '.join(given)}: without a GPU the optimizer is on the host already"] if cpu and given else []


@dataclass(frozen=True)
class StepResult:
    """Result of one optimizer step."""

    grad_norm: float
    """Global norm before clipping; not finite or a spike if the step was skipped."""
    learning_rate: float
    skipped: bool


class Optimizer:
    """Data-parallel model chunks and their Adam. `steps` counts the steps taken."""

    def __init__(
        self, chunks: Sequence[Any], recipe: Recipe, *, total_steps: int, global_name: Callable[[str], str] = str
    ) -> None:
        """`global_name` maps a parameter's name to its name in the whole model, for messages."""
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

        self._options, self._total_steps = recipe.optimizer, total_steps
        self._trains_draft = recipe.model.mtp_num_layers > 0
        bf16, self._cpu = recipe.model.bf16, backend.setup().cpu
        # fp32 accumulation is free on a CPU, and bf16 sums over many ranks lose what small steps need.
        in_fp32 = recipe.misc.accumulate_allreduce_grads_in_fp32 or self._cpu
        data_parallel = DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=in_fp32, check_for_nan_in_grad=False
        )
        self.chunks: list[Any] = [DistributedDataParallel(chunk.config, data_parallel, chunk) for chunk in chunks]
        config = OptimizerConfig(**_values(recipe.optimizer, bf16=bf16, cpu=self._cpu))
        if config.optimizer_cpu_offload:
            from vime.megatron import host_adam

            host_adam.install()
        overrides: Any = get_standard_config_overrides(config) | self._draft_overrides()
        self.megatron: Any = get_megatron_optimizer(config, self.chunks, overrides)
        if self._cpu:
            for group in self.megatron.param_groups:
                group["fused"] = True
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.megatron.scale_loss
            chunk.config.no_sync_func = self.chunks[0].no_sync
        self._global_name = global_name
        self.steps = 0
        self._skipped = 0
        self._norms, self._spikes_in_a_row = Window(GRAD_NORM), 0

    def _draft_overrides(self) -> dict[Any, dict[str, float]]:
        """Learning rate of the draft layers; also excludes their gradients from the norm that clips the policy's."""
        from megatron.core.optimizer.optimizer_config import ParamKey

        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                if _DRAFT in name:
                    # Megatron's mark for copies, which its gradient norm skips.
                    parameter.shared = True
        if self._options.mtp_lr is None or not self._trains_draft:
            return {}
        return {ParamKey(name=f"*{_DRAFT}*"): {"lr_mult": self._options.mtp_lr / self._options.lr}}

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self) -> StepResult:
        """Clip and step; skips the step if a gradient is not finite.

        `MAX_SKIPPED_STEPS` consecutive skips raise GradientsNotFinite. The norm is global, so all ranks decide alike.
        """
        rate = learning_rate(self._options, self.steps, self._total_steps)
        for group in self.megatron.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            # Megatron marks norms and biases (`wd_mult` 0) and leaves applying the mark to its scheduler.
            group["weight_decay"] = self._options.weight_decay * group.get("wd_mult", 1.0)
        norm = self._norm()
        if not math.isfinite(norm):
            self._refuse(norm)
            return StepResult(norm, rate, True)
        if self._spikes(norm):
            return StepResult(norm, rate, True)
        _, norm_again, _ = self.megatron.step()
        self._skipped = 0
        self.steps += 1
        return StepResult(float(norm if norm_again is None else norm_again), rate, False)

    def _spikes(self, norm: float) -> bool:
        """Whether this step is skipped because its norm spikes; `--spike-limit` in a row at most."""
        if self._options.spike_guard != "skip":
            return False
        if (
            self._norms.spreads(norm) <= self._options.spike_factor
            or self._spikes_in_a_row >= self._options.spike_limit
        ):
            self._norms.values.append(norm)
            self._spikes_in_a_row = 0
            return False
        self._spikes_in_a_row += 1
        if dist.get_rank() == 0:
            print(f"warning: optimizer step {self.steps} skipped: {self._norms.text(norm)}", flush=True)
        return True

    def _norm(self) -> float:
        self.megatron.prepare_grads()
        return float(self.megatron.get_grad_norm())

    def _refuse(self, norm: float) -> None:
        """Count and report a skipped step. Collective, so that all ranks know the names."""
        self._skipped += 1
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self._not_finite())
        # The last pipeline stage, where the backward pass starts, has the highest ranks.
        names = list(dict.fromkeys(name for found in reversed(ranks) for name in found))[:_NAMED_GRADIENTS]
        where = f"in the backward pass first at {', '.join(names)}" if names else "the gradients' squares overflow"
        if dist.get_rank() == 0:
            print(f"warning: optimizer step {self.steps} skipped: gradient norm is {norm}; {where}", flush=True)
        if self._skipped >= MAX_SKIPPED_STEPS:
            raise GradientsNotFinite(
                f"the gradient was not finite in {self._skipped} steps in a row, last norm {norm}; {where}: "
                "look at the rollout's rewards and log-probs, or resume from an older checkpoint at a lower --lr"
            )

    def _not_finite(self) -> list[str]:
        """First few parameters of this rank with non-finite gradients, in backward order."""
        found = []
        for chunk in reversed(self.chunks):
            for name, parameter in reversed(list(chunk.module.named_parameters())):
                gradient = getattr(parameter, "main_grad", None)
                if gradient is not None and not bool(torch.isfinite(gradient).all()):
                    found.append(self._global_name(name))
                    if len(found) == _NAMED_GRADIENTS:
                        return found
        return found

    def state_to_save(self, model_state: dict[str, Any]) -> dict[str | int, Any]:
        """`sharded_state` in the places and with the other values that Megatron-LM's loader expects. Collective."""
        found = self.sharded_state(model_state)
        states: list[dict[str, Any]] = []
        for number, optimizer in enumerate(self.megatron.chained_optimizers):
            # With gathering on one rank's host only that rank has the tensors.
            tensors = {"param_state": found[str(number)]} if str(number) in found else {}
            states.append({**optimizer_common(optimizer, self.steps), **tensors})
        return {**states[0]} if len(states) == 1 else dict(enumerate(states))

    def scheduler_state(self, batch: int) -> dict[str, Any]:
        """State of Megatron's scheduler; `batch` is the number of samples of a step."""
        return scheduler_state(self._options, self.steps, self._total_steps, batch)

    def sharded_state(self, model_state: dict[str, Any], *, to_load: bool = False) -> dict[str, Any]:
        """Master weights and moments as whole parameters keyed like the model's, so that any layout can load them.

        The optimizers' other values follow from the recipe and the number of steps; nothing of ours reads them,
        because a rank's optimizers (dense, expert) depend on its place. Collective.
        """
        # Gathering on one rank's host keeps a GPU from holding the states of its whole data-parallel group.
        metadata = {"distrib_optim_fully_reshardable_mem_efficient": not self._cpu}
        found = {}
        for number, optimizer in enumerate(self.megatron.chained_optimizers):
            self._allocate(optimizer, force=to_load)
            found[str(number)] = optimizer.sharded_param_state_fully_reshardable(model_state, to_load, metadata)
        return {number: state for number, state in found.items() if state is not None}

    def take_state(self, loaded: dict[str, Any]) -> None:
        """Put the loaded content of `sharded_state(..., to_load=True)` into the optimizers."""
        for number, optimizer in enumerate(self.megatron.chained_optimizers):
            states = optimizer.optimizer.state.values()
            # Torch's Adam counts steps in each parameter's state, where Megatron would look for a loaded tensor.
            counts = [state.pop("step", None) for state in states]
            optimizer.load_parameter_state_from_fully_reshardable(loaded[str(number)])
            for state, count in zip(states, counts, strict=True):
                if count is not None:
                    state["step"] = count
            if hasattr(optimizer.optimizer, "_sync_hdo_state_to_sub_optimizers"):
                optimizer.optimizer._sync_hdo_state_to_sub_optimizers()

    def _allocate(self, optimizer: Any, *, force: bool) -> None:
        """Create the moments (which otherwise exist only after a step), counted as `self.steps` steps."""
        if len(optimizer.optimizer.state) and not force:
            return
        groups = optimizer.optimizer.state_dict()["param_groups"]
        counted = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        for group in counted:
            group["step"] = self.steps
        fresh = not len(optimizer.optimizer.state)
        optimizer.load_state_dict({"optimizer": {"param_groups": counted}})
        for state in optimizer.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                # Megatron shares one tensor between all parameters, which a step would increment once for each.
                state["step"] = state["step"].clone()
            if fresh and not force:
                for name in self._options.kind.states:
                    if name in state:
                        state[name].zero_()

    def close(self) -> None:
        """Release the model, and with it the process groups and their threads; no training is possible afterwards.

        Megatron's backward hooks refer to their chunk through nodes that Python cannot collect.
        """
        for chunk in self.chunks:
            for node in chunk.grad_accs:
                # The hooks of a node share one dictionary, reachable through a new hook's handle.
                hooks = node.register_hook(lambda *_: None).hooks_dict_ref()
                assert hooks is not None
                hooks.clear()
            chunk.grad_accs.clear()

    def reload_master_weights(self) -> None:
        """Copy the model's weights into the optimizer's fp32 masters; required after loading weights."""
        self.megatron.reload_model_params()

    def check_master_weights(self) -> None:
        """Raise AssertionError if a master weight, rounded to the model's dtype, differs from the model's weight."""
        for model, master in self._master_pairs():
            assert torch.equal(master.detach().to(model.dtype).to(model.device), model), (
                f"the master weights of a shard of {model.numel()} elements are not the model's"
            )

    def _master_pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Flat shards of low-precision weights with their fp32 masters, where accessible."""
        for optimizer in self.megatron.chained_optimizers:
            # Masters of an optimizer on the host.
            yield from getattr(optimizer.optimizer, "param_to_fp32_param", {}).items()
            groups = getattr(optimizer, "model_float16_groups", [])
            masters = getattr(optimizer, "shard_fp32_from_float16_groups", [])
            for model, master in zip(itertools.chain(*groups), itertools.chain(*masters), strict=True):
                if master is not None:
                    span = optimizer._get_model_param_range_map(model)["param"]
                    yield model.detach().view(-1)[span.start : span.end], master


def _values(options: OptimizerOptions, *, bf16: bool, cpu: bool) -> dict[str, Any]:
    """Keyword values of Megatron's OptimizerConfig."""
    values: dict[str, Any] = {
        "optimizer": options.optimizer,
        "lr": options.lr,
        "min_lr": options.min_lr,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.adam_beta1,
        "adam_beta2": options.adam_beta2,
        "adam_eps": options.adam_eps,
        "clip_grad": options.clip_grad,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": True,
    }
    if not cpu:
        # Megatron restores the state of an offloaded optimizer only in its precision-aware form.
        precision_aware = options.use_precision_aware_optimizer or options.optimizer_cpu_offload
        if precision_aware and not options.optimizer_cpu_offload and not backend.setup().transformer_engine:
            raise BadInput(
                "--use-precision-aware-optimizer needs Transformer Engine, which is not installed: "
                "install it or give --optimizer-cpu-offload too"
            )
        values |= {
            "optimizer_cpu_offload": options.optimizer_cpu_offload,
            "optimizer_offload_fraction": 1.0 if options.optimizer_cpu_offload else 0.0,
            "overlap_cpu_optimizer_d2h_h2d": options.overlap_cpu_optimizer_d2h_h2d,
            "use_precision_aware_optimizer": precision_aware,
        }
    return values
