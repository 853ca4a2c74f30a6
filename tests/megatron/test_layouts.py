"""Every layout trains as one process does: the loss before and after steps, the gradient norm, every parameter's step.

With an epsilon far above the gradients Adam's step is the gradient times a constant, so that comparing the weights
after it compares every gradient. The norm alone would miss gradients summed over too few ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import patience, tiny_hf
from tests.support.layout_table import FULL, TABLE
from tests.support.single import MODELS
from tests.support.worker_cases import Case, Result, run_cases
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
COMPARED = ("loss", "pg_loss", "kl_loss", "entropy", "grad_norm", "pg_clipfrac", "ppo_kl", "tis", "opd_reverse_kl")


def with_algorithm(**options: Any) -> dict[str, dict[str, Any]]:
    return {**RECIPE, "algorithm": {**RECIPE["algorithm"], **options}}


# Everything the DeepSeek-R1 recipe gives to Megatron that is not a size.
RECIPE_OPTIONS = {
    "perf": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "misc": {
        "accumulate_allreduce_grads_in_fp32": True,
        "attention_softmax_in_fp32": True,
        "attention_backend": "flash",
        "moe_enable_deepep": True,
        "moe_token_dispatcher_type": "flex",
    },
    "optimizer": {
        **RECIPE["optimizer"],
        "optimizer_cpu_offload": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    },
}
# Changes that the result must not depend on, in one process.
SAME: dict[str, dict[str, dict[str, Any]]] = {
    "one_large": {**RECIPE, "perf": {"max_tokens_per_gpu": 512}},
    "one_fixed": {**RECIPE, "perf": {"use_dynamic_batch_size": False, "micro_batch_size": 3}},
    "one_recipe_options": {**RECIPE, **RECIPE_OPTIONS},
}
FIXED = {"use_dynamic_batch_size": False, "micro_batch_size": 2}
# Losses whose terms are sums over ranks: in one process and, packed in another way, over CP and PP.
LOSSES: dict[str, dict[str, dict[str, Any]]] = {
    "gspo": with_algorithm(advantage_estimator="gspo", eps_clip=0.05),
    "cispo_per_token": with_algorithm(advantage_estimator="cispo", calculate_per_token_loss=True),
    "reinforce_tis_kl_reward": with_algorithm(
        advantage_estimator="reinforce_plus_plus", use_tis=True, tis_clip=1.1, kl_coef=0.1, entropy_coef=0.01
    ),
    "sequence_masks": with_algorithm(
        mismatch_correction=["seq_tis", "geo_mask"], tis_clip=10.0, geo_mask_low=0.5, geo_mask_high=1.2
    ),
    "distilled": with_algorithm(use_opd=True, opd_kl_coef=0.7),
    "sft": with_algorithm(loss_type="sft_loss"),
}
MTP = {**RECIPE, "model": {"mtp_num_layers": 1}}
REPLAY = with_algorithm(use_routing_replay=True)
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MTP_SPLIT = {"world_size": 4, "pp": 2, "ep": 2}
SPLIT = {"world_size": 4, "cp": 2, "pp": 2, "first_stage_layers": 1}


def table(model: str, full: bool) -> dict[str, dict[str, Any]]:
    return {**TABLE[model], **(FULL[model] if full else {})}


def cases_of(model: str, folder: Path, checkpoint: str, full: bool) -> list[Case]:
    def case(name: str, layout: dict[str, Any], recipe: dict[str, dict[str, Any]]) -> Case:
        saved = {"checkpoint": {"conversion": "direct", "save": str(folder / "saved" / model / name)}}
        recipe = {**recipe, **saved}
        return Case(f"{model}-{name}", checkpoint, layout, recipe, rollouts=[0, 1], save_after=[0], score=True)

    found = [case("one", {}, RECIPE), *(case(name, layout, RECIPE) for name, layout in table(model, full).items())]
    if model == "deepseek":
        found += [case(name, {}, recipe) for name, recipe in SAME.items()]
        found += [case("mtp", {}, MTP), case("mtp_split", MTP_SPLIT, {**MTP, "perf": FIXED})]
        found += [case("mtp_context", SPLIT, {**MTP, "perf": FIXED}), case("replay", {}, REPLAY)]
        found += [case("replay_split", MTP_SPLIT, {**REPLAY, "perf": {**FIXED, **RECOMPUTED}})]
    if model == "qwen3":
        for name, recipe in LOSSES.items():
            found += [case(name, {}, recipe), case(f"{name}_split", SPLIT, {**recipe, "perf": FIXED})]
    return found


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    folder = tmp_path_factory.mktemp("layouts")
    cases: list[Case] = []
    for model in TABLE:
        checkpoint = tiny_hf.write_checkpoint(folder / "hf" / model, MODELS[model])
        cases += cases_of(model, folder, str(checkpoint), bool(request.config.getoption("--full")))
    # One start of eight processes: those that a small layout has no place for wait at the next one.
    return folder, run_cases(cases, 8, folder / "run", deadline=patience.GROUP + patience.MOMENT * len(cases))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"model", "name"} <= set(metafunc.fixturenames):
        full = bool(metafunc.config.getoption("--full"))
        metafunc.parametrize(("model", "name"), [(model, name) for model in TABLE for name in table(model, full)])


def steps_of(folder: Path, model: str, name: str) -> dict[str, torch.Tensor]:
    """Change of every parameter by two optimizer steps."""
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
    assert (ours.error, one.error) == ("", "")
    for mine, theirs in zip(ours.scores, one.scores, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)
    for rollout, (mine, theirs) in enumerate(zip(ours.metrics, one.metrics, strict=True)):
        assert set(mine) == set(theirs)
        for metric in (f"train/{metric}" for metric in COMPARED if f"train/{metric}" in theirs):
            assert mine[metric] == pytest.approx(theirs[metric], rel=2e-4, abs=5e-6), f"{metric} of rollout {rollout}"
    expected = steps_of(folder, model, reference)
    for parameter, step in steps_of(folder, model, name).items():
        norm = float(expected[parameter].norm())
        error = float((step - expected[parameter]).norm())
        # A step far below the weights is mostly rounding of the weights themselves.
        floor = 3e-7 * math.sqrt(step.numel())
        assert error <= 2e-3 * norm + floor, f"{parameter}: step of {norm:.3g} differs by {error:.3g}"


def test_a_layout_trains_as_one_process(results: tuple[Path, dict[str, Result]], model: str, name: str) -> None:
    same(*results, model, name, "one")


def test_the_steps_are_large_enough_to_compare(results: tuple[Path, dict[str, Result]]) -> None:
    folder, found = results
    metrics = found["deepseek-one"].metrics
    assert metrics[1]["train/kl_loss"] > 1e-4
    steps = steps_of(folder, "deepseek", "one")
    assert min(float(step.abs().max()) for step in steps.values()) > 1e-6


@pytest.mark.parametrize("change", SAME)
def test_packing_fixed_batches_and_the_recipes_options_change_nothing(
    results: tuple[Path, dict[str, Result]], change: str
) -> None:
    same(*results, "deepseek", change, "one")


@pytest.mark.parametrize("flag", ["--moe-enable-deepep", "--attention-backend flash", "--optimizer-cpu-offload"])
def test_options_without_effect_on_a_cpu_are_named(results: tuple[Path, dict[str, Result]], flag: str) -> None:
    said = results[1]["deepseek-one_recipe_options"].printed.splitlines()
    assert len([line for line in said if line.startswith("note: ") and flag in line]) == 1


@pytest.mark.parametrize("split", ["mtp_split", "mtp_context"])
def test_multi_token_prediction_trains_the_same_over_stages_experts_and_context_ranks(
    results: tuple[Path, dict[str, Result]], split: str
) -> None:
    same(*results, "deepseek", split, "mtp")


def test_replayed_routes_train_the_same_over_stages_and_experts_and_in_recomputation(
    results: tuple[Path, dict[str, Result]],
) -> None:
    same(*results, "deepseek", "replay_split", "replay")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_the_same_over_ranks_and_at_another_packing(
    results: tuple[Path, dict[str, Result]], loss: str
) -> None:
    same(*results, "qwen3", f"{loss}_split", loss)
