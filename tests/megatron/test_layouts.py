"""Every layout trains as one process does: the loss before and after steps, the gradient norm, every parameter's step.

With an epsilon far above the gradients Adam's step is the gradient times a constant, so that comparing the weights
after it compares every gradient. The norm alone would miss gradients summed over too few ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny_hf
import torch
from layout_table import TABLE
from single import MODELS
from worker_cases import Case, Result, run_cases

from vime.checkpoint.torch_dist import TorchDistReader
from vime.models.config import ModelConfig
from vime.models.families import params_of
from vime.models.transform import join

pytestmark = pytest.mark.e2e

RECIPE: dict[str, dict[str, Any]] = {
    # The KL makes the loss depend on the weights from the second step on; the policy term alone would not show it.
    "algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.5, "eps_clip_high": 0.28},
    "optimizer": {"lr": 200.0, "adam_eps": 1e4, "weight_decay": 0.0, "clip_grad": 0.0},
}
COMPARED = ("train/loss", "train/kl_loss", "train/entropy", "train/grad_norm", "train/pg_clipfrac", "train/ppo_kl")
PER_TOKEN = {**RECIPE, "algorithm": {**RECIPE["algorithm"], "calculate_per_token_loss": True}}
FIXED = {**RECIPE, "perf": {"use_dynamic_batch_size": False, "micro_batch_size": 3}}
TWO_LARGE = {**RECIPE, "perf": {"max_tokens_per_gpu": 512}}
RECOMPUTED = {
    **RECIPE,
    "perf": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def cases_of(model: str, folder: Path, checkpoint: str) -> list[Case]:
    def case(name: str, layout: dict[str, Any], recipe: dict[str, dict[str, Any]]) -> Case:
        saved = {"checkpoint": {"conversion": "direct", "save": str(folder / "saved" / model / name)}}
        recipe = {**recipe, **saved}
        return Case(f"{model}-{name}", checkpoint, layout, recipe, rollouts=[0, 1], save_after=[0], score=True)

    found = [case("one", {}, RECIPE), *(case(name, layout, RECIPE) for name, layout in TABLE[model].items())]
    if model == "deepseek":
        found += [
            case("one_large", {}, TWO_LARGE),
            case("one_fixed", {}, FIXED),
            case("one_recomputed", {}, RECOMPUTED),
            case("token", {}, PER_TOKEN),
            case("token_dp2_fixed", {"world_size": 2}, {**PER_TOKEN, **{"perf": FIXED["perf"]}}),
        ]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    folder = tmp_path_factory.mktemp("layouts")
    cases: list[Case] = []
    for model in TABLE:
        checkpoint = tiny_hf.write_checkpoint(folder / "hf" / model, MODELS[model])
        cases += cases_of(model, folder, str(checkpoint))
    found: dict[str, Result] = {}
    for processes in (2, 4, 8):
        size = {case.name: case.layout.get("world_size", 1) for case in cases}
        chosen = [case for case in cases if size[case.name] == processes or (processes == 2 and size[case.name] == 1)]
        found |= run_cases(chosen, processes, folder / f"run{processes}")
    return folder, found


def steps_of(folder: Path, model: str, name: str) -> dict[str, torch.Tensor]:
    """What two optimizer steps took off every parameter."""
    config = ModelConfig.from_hf(MODELS[model])
    reader = TorchDistReader(folder / "saved" / model / name, config)
    start = tiny_hf.random_tensors(MODELS[model])
    return {
        param.name: join(param, {part.name: start[part.name] for part in param.parts}).float() - reader.read(param)
        for param in params_of(config)
        if param in reader and not param.buffer
    }


def same(folder: Path, found: dict[str, Result], model: str, name: str, reference: str) -> None:
    ours, one = found[f"{model}-{name}"], found[f"{model}-{reference}"]
    assert ours.error == ""
    for mine, theirs in zip(ours.scores, one.scores, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)
    for rollout, (mine, theirs) in enumerate(zip(ours.metrics, one.metrics, strict=True)):
        for metric in COMPARED:
            assert mine[metric] == pytest.approx(theirs[metric], rel=2e-4, abs=5e-6), f"{metric} of rollout {rollout}"
    expected = steps_of(folder, model, reference)
    for parameter, step in steps_of(folder, model, name).items():
        norm = float(expected[parameter].norm())
        error = float((step - expected[parameter]).norm())
        # A step far below the weights is mostly rounding of the weights themselves.
        floor = 3e-7 * math.sqrt(step.numel())
        assert error <= 2e-3 * norm + floor, f"{parameter}: step of {norm:.3g} differs by {error:.3g}"


@pytest.mark.parametrize(("model", "name"), [(model, name) for model, table in TABLE.items() for name in table])
def test_a_layout_trains_as_one_process(results: tuple[Path, dict[str, Result]], model: str, name: str) -> None:
    same(*results, model, name, "one")


def test_the_steps_are_large_enough_to_compare(results: tuple[Path, dict[str, Result]]) -> None:
    folder, found = results
    metrics = found["deepseek-one"].metrics
    assert metrics[1]["train/kl_loss"] > 1e-4
    steps = steps_of(folder, "deepseek", "one")
    assert min(float(step.abs().max()) for step in steps.values()) > 1e-6


@pytest.mark.parametrize("name", ["one_large", "one_fixed", "one_recomputed"])
def test_packing_and_recompute_change_nothing(results: tuple[Path, dict[str, Result]], name: str) -> None:
    same(*results, "deepseek", name, "one")


def test_the_token_mean_is_the_same_at_another_packing_and_dp(results: tuple[Path, dict[str, Result]]) -> None:
    same(*results, "deepseek", "token_dp2_fixed", "token")
