"""One rank of the trainer: methods that the training loop calls on all ranks at once.

One module since they share the parts that `setup` makes.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vime.checkpoint.hf import HFCheckpoint
from vime.checkpoint.load import load_hf_into
from vime.errors import BadInput, DataError
from vime.megatron import backend, losses, optimizer
from vime.megatron.advantages import advantage_column, loss_mask, teacher_column
from vime.megatron.checkpoint_folders import State
from vime.megatron.checkpointing import Checkpointer
from vime.megatron.microbatch import RolloutTokens, optimizer_steps
from vime.megatron.model import BuildOptions, build_model
from vime.megatron.objective import METRICS, Objective
from vime.megatron.parallel import destroy_parallel, init_parallel
from vime.megatron.passes import ModelPasses, Packer
from vime.megatron.profiling import Profiler
from vime.megatron.reference import HostWeights
from vime.megatron.residence import Residence
from vime.megatron.routes import EngineRoutes, Routes, differing_shares
from vime.megatron.spans import SpanRecorder
from vime.models.flops import utilisation
from vime.models.local import global_name
from vime.run.checkpoints import has_tracker, tracks_iteration
from vime.run.plan import Plan
from vime.run.routes import RoutesFile, routes_path
from vime.samples import Rollout
from vime.sync.ranks import StartState
from vime.sync.source import WeightSource, model_source
from vime.system.memory import return_free_memory
from vime.system.progress import Progress


@dataclass
class _Parts:
    """Parts of a rank that `setup` builds: the model and everything that works on it."""

    chunks: Sequence[Any]
    optimizer: optimizer.Optimizer
    residence: Residence
    checkpointer: Checkpointer
    passes: ModelPasses
    routes: Routes
    """Routes to experts; empty without `--use-routing-replay` and `--use-rollout-routing-replay`."""
    reference: HostWeights | None = None
    """Reference model weights; None if no KL needs them."""
    weights: WeightSource | None = None
    """Source of the weight sync; None in a plan without engines."""


class TrainWorker:
    """One Megatron rank of a plan, on logical node `node`.

    `key` guards the ranks' meeting point; `progress` tells another thread what this rank does.
    """

    def __init__(
        self, plan: Plan, rank: int, node: int = 0, *, key: bytes | None = None, progress: Progress | None = None
    ) -> None:
        self.plan, self.rank, self.node, self.recipe = plan, rank, node, plan.recipe
        self.config = plan.model
        self.layout = plan.layout
        self.coords = plan.layout.coordinates(rank)
        self._parts: _Parts | None = None
        self._key = key
        self._clock = SpanRecorder(progress)
        self._profiler = Profiler(plan, rank)

    # --- start

    def setup(self, master_address: str, master_port: int) -> StartState:
        """Join the other ranks, build model and optimizer, load weights and, on resume, the run's state."""
        recipe, options = self.recipe, BuildOptions.from_recipe(self.recipe)
        seed = recipe.misc.seed
        init_parallel(
            self.layout,
            rank=self.rank,
            master_address=master_address,
            master_port=master_port,
            seed=seed,
            key=self._key,
        )
        self._parts = self._build(options)
        if self.rank == 0:
            cpu = backend.setup().cpu
            for note in (*options.without_effect(cpu), *optimizer.notes(recipe.optimizer, cpu)):
                print(f"note: {note}", flush=True)
        start = self._load()
        if self.plan.engines:
            self._parts.weights = model_source(
                self._parts.chunks, self.config, self.layout, self.coords, self.plan, self.rank
            )
        return start

    def _build(self, options: BuildOptions) -> _Parts:
        """Build model, optimizer and their users, with random weights."""
        recipe = self.recipe
        trains_mtp = recipe.model.mtp_num_layers > 0
        chunks = build_model(self.config, self.layout, bf16=recipe.model.bf16, mtp=trains_mtp, options=options)
        total_steps = recipe.rollout.num_rollout * recipe.rollout.steps
        named = functools.partial(global_name, config=self.config, layout=self.layout, coords=self.coords)
        adam = optimizer.Optimizer(chunks, recipe, total_steps=total_steps, global_name=named)
        for chunk in chunks:
            reduce: Any = chunk.config.finalize_model_grads_func
            chunk.config.finalize_model_grads_func = self._clock.after_all_ranks(reduce)
        checkpointer = Checkpointer(
            chunks,
            adam,
            self.config,
            self.layout,
            self.coords,
            keep=recipe.checkpoint.save_keep,
            background=recipe.checkpoint.async_save,
            samples_per_step=max(1, recipe.rollout.samples // recipe.rollout.steps),
        )
        residence = Residence(adam.chunks, adam.megatron, self.node)
        return _Parts(chunks, adam, residence, checkpointer, self._make_passes(adam.chunks), Routes(adam.chunks))

    def _make_passes(self, chunks: Sequence[Any]) -> ModelPasses:
        from megatron.core import parallel_state as ps

        tensor: Any = ps.get_tensor_model_parallel_group()
        context: Any = ps.get_context_parallel_group()
        objective = Objective(self.recipe.algorithm, self.recipe.rollout.rollout_temperature, tensor, context)
        return ModelPasses(chunks, objective, Packer(self.recipe.perf, self.layout), self.coords, self._clock.progress)

    @property
    def _ready(self) -> _Parts:
        if self._parts is None:
            raise RuntimeError("setup has not run")
        return self._parts

    def _load(self) -> StartState:
        """Load the reference weights first, if a KL needs them, then the weights that training starts from."""
        recipe, load = self.recipe, self.recipe.checkpoint.load
        resumes = tracks_iteration(load)
        needed = recipe.needs_reference
        if needed or not resumes:
            start = self._load_start()
            if needed:
                self._ready.reference = HostWeights(self._ready.chunks)
            if not resumes:
                return start
        assert load is not None
        state, folder = self._ready.checkpointer.load(load)
        return StartState(state.rollout_id + 1, str(folder), state.extra)

    def _load_start(self) -> StartState:
        """Load `--load` with a release, else an HF folder to start from, else `--ref-load`, else the HF checkpoint."""
        checkpoint = self.recipe.checkpoint
        for root in (checkpoint.load, None if checkpoint.start_from else checkpoint.ref_load):
            if root is not None and self._holds_weights(Path(root)):
                return StartState(0, str(self._ready.checkpointer.load_weights(root)))
        if checkpoint.ref_load is not None and checkpoint.conversion != "direct":
            raise BadInput(f"--ref-load {checkpoint.ref_load} holds no checkpoint: run the convert stage first")
        start = checkpoint.start_from or checkpoint.hf_checkpoint
        if start is None:
            raise BadInput("there are no weights to start from: give --ref-load or --hf-checkpoint")
        source = HFCheckpoint(start)
        load_hf_into(self._ready.chunks, source, self.config, self.layout, self.coords)
        self._ready.checkpointer.took_weights()
        return StartState(0, start)

    @staticmethod
    def _holds_weights(root: Path) -> bool:
        if (root / ".metadata").exists():
            return True
        return has_tracker(root) and not tracks_iteration(root)

    # --- training

    def train(self, rollout: Rollout) -> dict[str, float]:
        """Run all optimizer steps of a rollout. Returns metrics, the same on every rank."""
        with self._profiler.during(rollout.rollout_id):
            metrics = self._train(rollout)
        # Arrays of a rollout are of other sizes than the last one's: heaps that keep the pieces grow.
        return_free_memory()
        return metrics

    def _train(self, rollout: Rollout) -> dict[str, float]:
        self._ready.checkpointer.poll()
        samples = rollout.samples
        if not samples:
            raise DataError(f"rollout {rollout.rollout_id} has no samples to train on")
        self._reseed(rollout.rollout_id)
        data = RolloutTokens.of(
            [(s.prompt_ids, s.response_ids) for s in samples], longest=self.config.max_position_embeddings
        )
        self._clock.take_spans()
        self._take_routes(rollout.rollout_id, data)
        columns = self._columns(rollout, data)
        masks = [loss_mask(sample) for sample in samples]
        steps = optimizer_steps(len(samples), self.recipe.rollout.steps)
        with self._clock.span("train"):
            results = [self._step(data, number, step, masks, columns) for number, step in enumerate(steps)]
        metrics = _means(results) | self._differing()
        self._ready.routes.forget()
        times, lengths = self._clock.seconds(), [len(sequence) for sequence in data.sequences]
        metrics["perf/train_tokens_per_s"] = sum(lengths) / max(times["train"], 1e-9)
        metrics |= self._utilisation(lengths, times["train"])
        return metrics | {f"perf/{name}_time": seconds for name, seconds in times.items()}

    def _utilisation(self, lengths: Sequence[int], seconds: float) -> dict[str, float]:
        """`perf/mfu` of the optimizer steps; empty if the device's peak is unknown."""
        device = "" if backend.setup().cpu else torch.cuda.get_device_name()
        found = utilisation(self.config, lengths, seconds=seconds, gpus=self.layout.world_size, device=device)
        return {} if found is None else {"perf/mfu": found}

    def take_spans(self) -> list[tuple[str, float, float]]:
        """(name, start, end) in Unix seconds for this rank's work in the last `train`; waits lie inside its steps."""
        return self._clock.take_spans()

    def _columns(self, rollout: Rollout, data: RolloutTokens) -> dict[str, torch.Tensor]:
        """Per-token inputs of the loss, except its weight."""
        algorithm, limit, parts = self.recipe.algorithm, self.recipe.perf.forward_tokens_per_gpu, self._ready
        columns: dict[str, torch.Tensor] = {}
        if algorithm.loss_type == "sft_loss":
            return columns
        if parts.reference is not None:
            with self._clock.span("ref_log_probs"), parts.reference.in_place():
                if algorithm.use_rollout_routing_replay:
                    columns["reference"] = self._replayed_log_probs(data, count=False)
                else:
                    columns["reference"] = parts.passes.log_probs(data, limit)
        if all(len(sample.log_probs) == len(sample.response_ids) for sample in rollout.samples):
            columns["rollout"] = torch.tensor(
                [value for sample in rollout.samples for value in sample.log_probs], dtype=torch.float32
            )
        elif "rollout" in algorithm.needed_columns:
            raise DataError(
                "--use-tis, --mismatch-correction and --use-rollout-logprobs need the engine's log-probs of every "
                "response token, and some are missing"
            )
        if algorithm.use_rollout_logprobs:
            columns["old"] = columns["rollout"]
        elif self.recipe.rollout.steps > 1 or "old" in algorithm.needed_columns:
            with self._clock.span("log_probs"):
                columns["old"] = self._old_log_probs(data)
        if algorithm.use_opd:
            columns["teacher"] = teacher_column(rollout)
        longest = self.recipe.rollout.rollout_max_response_len
        columns["advantages"] = advantage_column(rollout, data, columns, algorithm, longest)
        return columns

    def _old_log_probs(self, data: RolloutTokens) -> torch.Tensor:
        """Log-probs before the first step; routing replay uses the steps' micro-batches, to keep their routes."""
        parts, perf = self._ready, self.recipe.perf
        if self.recipe.algorithm.use_rollout_routing_replay:
            return self._replayed_log_probs(data, count=True)
        if not self.recipe.algorithm.use_routing_replay:
            return parts.passes.log_probs(data, perf.forward_tokens_per_gpu)
        parts.routes.forget()
        column = torch.zeros(data.response_tokens)
        for number, step in enumerate(optimizer_steps(len(data.sequences), self.recipe.rollout.steps)):
            around = functools.partial(self._recording, number)
            column += parts.passes.log_probs(data, perf.max_tokens_per_gpu, step, around)
        parts.routes.rewind()
        return column

    def _take_routes(self, rollout_id: int, data: RolloutTokens) -> None:
        """Map the engines' routes of the rollout, if they are replayed, as they belong to its micro-batches."""
        if not self.recipe.algorithm.use_rollout_routing_replay:
            return
        assert self.config.moe is not None
        parts, limit = self._ready, self.recipe.perf.max_tokens_per_gpu
        file = RoutesFile(routes_path(self.plan.run_dir, rollout_id))
        engines = EngineRoutes(file, data, parts.routes.layers, self.config.moe.num_experts, self.layout, self.coords)
        steps = optimizer_steps(len(data.sequences), self.recipe.rollout.steps)
        packed = [parts.passes.micro_batches(data, step, limit) for step in steps]
        parts.routes.take(lambda key: engines.of(packed[key[0]][key[1]]))

    def _differing(self) -> dict[str, float]:
        if not self.recipe.algorithm.use_rollout_routing_replay:
            return {}
        return differing_shares(self._ready.routes, self.config.num_layers, backend.setup().device)

    def _replayed_log_probs(self, data: RolloutTokens, *, count: bool) -> torch.Tensor:
        """Log-probs with the engines' routes, in the micro-batches of the optimizer steps."""
        parts = self._ready
        column = torch.zeros(data.response_tokens)
        for number, step in enumerate(optimizer_steps(len(data.sequences), self.recipe.rollout.steps)):

            def around(micro_batch: int, number: int = number) -> AbstractContextManager[None]:
                return parts.routes.replaying((number, micro_batch), count=count)

            column += parts.passes.log_probs(data, self.recipe.perf.max_tokens_per_gpu, step, around)
        parts.routes.rewind()
        return column

    def _recording(self, step: int, micro_batch: int) -> AbstractContextManager[None]:
        return self._ready.routes.recording((step, micro_batch))

    def _replaying(self, step: int, micro_batch: int) -> AbstractContextManager[None]:
        return self._ready.routes.replaying((step, micro_batch))

    def _step(
        self,
        data: RolloutTokens,
        number: int,
        step: Sequence[int],
        masks: list[torch.Tensor],
        columns: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """Run one optimizer step on these samples."""
        weights = torch.zeros(data.response_tokens)
        options = self.recipe.algorithm
        shares = losses.token_weights(
            [masks[i] for i in step], per_token=options.calculate_per_token_loss, length=options.constant_loss_length
        )
        for sample, value in zip(step, shares, strict=True):
            weights[data.response(sample)] = value
        parts = self._ready
        parts.optimizer.zero_grad()
        replays = options.use_routing_replay and options.loss_type == "policy_loss"
        replays = replays or options.use_rollout_routing_replay
        around = functools.partial(self._replaying, number) if replays else None
        measured = parts.passes.gradients(
            data, step, {**columns, "weights": weights}, self.recipe.perf.max_tokens_per_gpu, around
        )
        parts.routes.rewind()
        done = parts.optimizer.step()
        values = {f"train/{name}": measured[name] for name in self._reported}
        values |= {"train/grad_norm": done.grad_norm, "train/lr": done.learning_rate}
        return values | {"train/skipped_steps": float(done.skipped)}

    @property
    def _reported(self) -> list[str]:
        algorithm = self.recipe.algorithm
        if algorithm.loss_type == "sft_loss":
            return ["loss", "entropy"]
        absent = {"tis", "tis_masked"} if not algorithm.corrections else set()
        if self._ready.reference is None:
            absent.add("kl_loss")
        if not self.recipe.model.mtp_num_layers:
            absent |= {"draft_loss", "draft_acceptance"}
        if not algorithm.use_opd:
            absent.add("opd_reverse_kl")
        return [name for name in METRICS if name not in absent]

    def log_probs(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probs of the responses, in nats, at the rollout temperature; the same on every rank."""
        data = RolloutTokens.of(sequences, longest=self.config.max_position_embeddings)
        found = self._ready.passes.log_probs(data, self.recipe.perf.forward_tokens_per_gpu)
        return [values.tolist() for values in data.split(found)]

    def _reseed(self, rollout_id: int) -> None:
        """Seed from seed and rollout alone, so that a resumed run draws the same numbers as an uninterrupted one."""
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        seed = self.recipe.misc.seed + 1009 * (rollout_id + 1)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)

    # --- output of the trainer

    @property
    def weights(self) -> WeightSource:
        """Source of the weight sync."""
        if self._ready.weights is None:
            raise RuntimeError("the plan has no engines")
        return self._ready.weights

    @property
    def residence(self) -> Residence:
        """The rank's memory, movable between GPU and host."""
        return self._ready.residence

    def save(self, rollout_id: int, extra: dict[str, Any]) -> str:
        """Write a checkpoint below `--save`; returns its folder. `extra` must be JSON."""
        json.dumps(extra)  # on every rank, so that all fail alike
        root = self.recipe.checkpoint.save
        if root is None:
            raise BadInput("--save is not set: give a folder for checkpoints")
        folder = self._ready.checkpointer.save(root, State(rollout_id, self._ready.optimizer.steps, extra))
        return str(folder)

    def poll_save(self) -> bool:
        """Publish a background checkpoint if it is written; returns True if none is still being written."""
        return self._ready.checkpointer.poll()

    def finish_save(self) -> None:
        """Wait until a background checkpoint is published."""
        self._ready.checkpointer.finish()

    def close(self) -> None:
        """Finish background work and leave the process groups."""
        if self._parts is not None:
            self._parts.checkpointer.close()
            self._parts.optimizer.close()
        destroy_parallel()


def _means(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the steps. Skipped steps are summed but otherwise excluded; the learning rate is the last."""
    whole = [result for result in results if not result["train/skipped_steps"]]
    found = {name: sum(r[name] for r in whole) / len(whole) for name in results[0]} if whole else {}
    found["train/skipped_steps"] = sum(result["train/skipped_steps"] for result in results)
    found["train/lr"] = results[-1]["train/lr"]
    return found
