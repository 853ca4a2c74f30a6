"""Routes to experts are those of the pass that recorded them, in forward passes and in recomputation."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.support.single import MODELS, built, one_process
from tests.support.worker_cases import rollout_of
from vime.errors import VimeError
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

    def __init__(self, layout: Any, **options: Any) -> None:
        build = BuildOptions(use_routing_replay=True, **options)
        self.optimizer = Optimizer(built(HF, layout, options=build), RECIPE, total_steps=1)
        self.passes = ModelPasses(
            self.optimizer.chunks, Objective(AlgorithmOptions(), 1.0), Packer(PERF, layout), layout.coordinates(0)
        )
        self.routes = Routes(self.optimizer.chunks)
        samples = rollout_of(0, HF["vocab_size"]).samples
        self.data = RolloutTokens.of([(sample.prompt_ids, sample.response_ids) for sample in samples])
        self.samples = range(len(samples))
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

    def move_routers(self) -> None:
        """Other experts for most tokens, by a bias that only the choice looks at: probabilities stay."""
        for name, buffer in self.optimizer.chunks[0].module.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(torch.linspace(-3, 3, buffer.numel()))


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "recomputed"])
def test_a_replayed_pass_routes_as_the_recorded_one_though_routers_have_moved(options: dict[str, Any]) -> None:
    with one_process() as layout:
        problem = Problem(layout, **options)
        plain, recorded = problem.log_probs(), problem.log_probs(problem.routes.recording)
        assert torch.equal(plain, recorded)
        expected = problem.gradients()
        assert problem.routes.bytes > 0
        problem.move_routers()
        assert not torch.allclose(problem.log_probs(), recorded)
        assert torch.equal(problem.log_probs(problem.routes.replaying), recorded)
        found = problem.gradients(problem.routes.replaying)
        for name, gradient in expected.items():
            assert torch.equal(gradient, found[name]), name
        problem.optimizer.close()


def test_routes_that_were_not_recorded_or_were_forgotten_are_an_error() -> None:
    with one_process() as layout:
        problem = Problem(layout)
        problem.log_probs(problem.routes.recording)
        problem.routes.forget()
        with pytest.raises(VimeError, match="no routes were recorded of micro-batch 0 of step 0"):
            problem.log_probs(problem.routes.replaying)
        problem.optimizer.close()
