"""An estimator and a policy loss from outside of vime, added as a stranger would: by `module:function`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support import algorithm_plugins
from tests.support.small_rollouts import rollout_of
from vime.errors import BadInput, DataError
from vime.megatron.advantages import advantage_column
from vime.megatron.objective import Objective
from vime.recipe.load import load_recipe
from vime.recipe.schema import AlgorithmOptions
from vime.run.code import plugin_modules


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(algorithm_plugins.__file__).parent))
    sys.modules.pop("algorithm_plugins", None)


def test_an_estimator_from_outside_gives_the_advantages() -> None:
    recipe = load_recipe("tiny-qwen3", ["--advantage-estimator", "algorithm_plugins:leave_one_out"])
    rollout, data = rollout_of([[1.0, 0.0, 0.0], [0.5, 0.5], [2.0]], [2])
    column = advantage_column(rollout, data, {}, recipe.algorithm)
    assert column.tolist() == pytest.approx([1.0] * 2 + [-0.5] * 4 + [0.0] * 6)
    assert plugin_modules(recipe) == ["algorithm_plugins"]


def test_a_policy_loss_from_outside_is_the_objectives() -> None:
    options = AlgorithmOptions(policy_loss_type="algorithm_plugins:plain_policy_gradient")
    assert Objective(options, 1.0).policy_loss.__name__ == "plain_policy_gradient"


@pytest.mark.parametrize("flag", ["--advantage-estimator", "--policy-loss-type"])
def test_a_name_in_no_table_is_refused_with_those_that_are(flag: str) -> None:
    with pytest.raises(BadInput, match=rf"^{flag} is 'rloo': give one of .*cispo.*, or package\.module:function$"):
        load_recipe("tiny-qwen3", [flag, "rloo"])


def test_a_plugin_that_cannot_be_loaded_is_named_with_its_flag() -> None:
    objective = Objective(AlgorithmOptions(policy_loss_type="algorithm_plugins:absent"), 1.0)
    with pytest.raises(BadInput, match="--policy-loss-type: algorithm_plugins:absent cannot be loaded"):
        _ = objective.policy_loss


def test_an_answer_of_another_shape_is_refused() -> None:
    rollout, data = rollout_of([[1.0, 0.0]], [2])
    options = AlgorithmOptions(advantage_estimator="algorithm_plugins:one_a_sample")
    with pytest.raises(DataError, match=r"gave tensors of the shapes \[\(\), \(\)\].*one tensor a sample"):
        advantage_column(rollout, data, {}, options)


def test_the_tables_entries_are_no_plugins() -> None:
    assert plugin_modules(load_recipe("tiny-qwen3")) == []
