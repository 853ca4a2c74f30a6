"""Options of the algorithm and the optimizer are not dead: a real rank trains to other weights with another value."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.support import tiny_hf
from tests.support.single import MODELS, free_port
from tests.support.trained_options import TRAINED, Groups
from tests.support.worker_cases import Case, plan_of, rollout_of
from vime.megatron.worker import TrainWorker
from vime.recipe.flags import recipe_options


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_hf.write_checkpoint(tmp_path_factory.mktemp("options") / "hf", MODELS["qwen3"]))


def trained(checkpoint: str, folder: Path, groups: Groups) -> tuple[torch.Tensor, float]:
    """All weights after two rollouts of two steps, and the last loss."""
    plan = plan_of(Case("one", checkpoint, recipe=groups), folder)
    worker = TrainWorker(plan, 0)
    try:
        worker.setup("127.0.0.1", free_port())
        vocabulary = MODELS["qwen3"]["vocab_size"]
        losses = [worker.train(rollout_of(number, vocabulary))["train/loss"] for number in range(2)]
        assert worker._parts is not None
        weights = torch.cat([p.detach().flatten().clone() for c in worker._parts.chunks for p in c.parameters()])
    finally:
        worker.close()
    return weights, losses[-1]


@pytest.fixture(scope="module")
def known(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, float]]:
    """Results by recipe: most options share one."""
    return {}


@pytest.mark.parametrize("name", sorted(TRAINED))
def test_another_value_trains_to_other_weights(name: str, checkpoint: str, known: dict, tmp_path: Path) -> None:
    groups, value = TRAINED[name]
    base = {"rollout": {"num_steps_per_rollout": 2, "rollout_max_response_len": 32}}
    first = {**groups, "rollout": {**base["rollout"], **groups.get("rollout", {})}}
    target = recipe_options()[name]
    second = copy.deepcopy(first)
    second.setdefault(target.group, {})[target.field] = value
    if repr(first) not in known:
        known[repr(first)] = trained(checkpoint, tmp_path, first)
    (weights, loss), (others, other_loss) = known[repr(first)], trained(checkpoint, tmp_path, second)
    assert torch.isfinite(others).all()
    assert not torch.equal(weights, others), f"{name}: the same weights with {value!r}; losses {loss}, {other_loss}"
