"""A small model with experts, and routes that were recorded before its routers moved."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from tests.support.single import MODELS, built
from tests.support.worker_cases import rollout_of
from vime.megatron.losses import token_weights
from vime.megatron.microbatch import RolloutTokens
from vime.megatron.model import BuildOptions
from vime.megatron.objective import Objective
from vime.megatron.optimizer import Optimizer
from vime.megatron.passes import ModelPasses, Packer
from vime.megatron.routes import Routes
from vime.recipe.schema import AlgorithmOptions, ModelOptions, OptimizerOptions, PerfOptions, Recipe

HF = MODELS["deepseek"]
PERF = PerfOptions(use_dynamic_batch_size=True, max_tokens_per_gpu=48)
RECIPE = Recipe(name="r", model=ModelOptions(bf16=False), optimizer=OptimizerOptions(lr=1e-3), perf=PERF)
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


class Problem:
    """A model whose routers were moved after their routes were recorded."""

    def __init__(self, layout: Any, replay: str = "trainer", **options: Any) -> None:
        """`replay`: whose routes, "trainer" or "engine"."""
        own = replay == "trainer"
        build = BuildOptions(use_routing_replay=own, use_rollout_routing_replay=not own, **options)
        self.optimizer = Optimizer(built(HF, layout, options=build), RECIPE, total_steps=1)
        self.passes = ModelPasses(
            self.optimizer.chunks, Objective(AlgorithmOptions(), 1.0), Packer(PERF, layout), layout.coordinates(0)
        )
        self.routes = Routes(self.optimizer.chunks)
        samples = rollout_of(0, HF["vocab_size"]).samples
        self.data = RolloutTokens.of([(sample.prompt_ids, sample.response_ids) for sample in samples])
        self.samples = range(len(samples))
        self.packed = self.passes.micro_batches(self.data, self.samples, 48)
        masks = [torch.tensor(sample.loss_mask, dtype=torch.float32) for sample in samples]
        self.columns = {
            "weights": torch.cat(token_weights(masks, per_token=False)),
            "advantages": torch.randn(self.data.response_tokens, generator=torch.Generator().manual_seed(1)),
        }

    def log_probs(self, context: Any = None) -> torch.Tensor:
        around = functools.partial(self._around, context) if context else None
        found = self.passes.log_probs(self.data, 48, self.samples, around)
        self.routes.rewind()
        return found

    def gradients(self, context: Any = None) -> dict[str, torch.Tensor]:
        around = functools.partial(self._around, context) if context else None
        self.optimizer.zero_grad()
        self.passes.gradients(self.data, self.samples, self.columns, 48, around)
        self.routes.rewind()
        module = self.optimizer.chunks[0].module
        return {name: parameter.main_grad.clone() for name, parameter in module.named_parameters()}

    def _around(self, context: Any, micro_batch: int) -> Any:
        return context((0, micro_batch))

    def rows(self) -> list[np.ndarray]:
        """Routes that an engine with this model would return: for each sample [tokens - 1, layers, top-k]."""
        kept: dict[int, list[torch.Tensor]] = {}
        self.log_probs(self.routes.recording)
        for number in range(len(self.packed)):
            kept[number] = self.routes.recorded((0, number))
        found = [
            np.zeros((len(s) - 1, HF["num_hidden_layers"], HF["num_experts_per_tok"]), np.uint8)
            for s in self.data.sequences
        ]
        for number, members in enumerate(self.packed):
            for place, layer in enumerate(self.routes.layers):
                start = 0
                for sample in members:
                    rows = len(found[sample])
                    found[sample][:, layer] = kept[number][place][start : start + rows].numpy()
                    start += rows + 1
        self.routes.forget()
        return found

    def move_routers(self) -> None:
        """Other experts for most tokens, by a bias that only the choice looks at: probabilities stay."""
        for name, buffer in self.optimizer.chunks[0].module.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.linspace(-3, 3, buffer.numel()))
