"""The trainer on a GPU computes what it computes on a CPU, keeps its optimizer on the host, and resumes."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny_hf
from tests.support.single import MODELS, fill_from, one_process
from tests.support.worker_cases import Case, Result, run_cases
from vime.megatron.model import build_model
from vime.megatron.optimizer import Optimizer
from vime.models.config import ModelConfig
from vime.models.flops import peak_flops
from vime.recipe.schema import Recipe

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RECIPE: dict[str, dict[str, Any]] = {
    "algorithm": {"use_kl_loss": True, "kl_loss_coef": 0.5},
    # With Adam's usual epsilon the first step is the gradient's sign, and rounding decides it where gradients are near
    # zero: weights off by one part in 10^7 then change the loss by 2 % on a CPU alone.
    "optimizer": {"lr": 1e-3, "adam_eps": 1e-3, "weight_decay": 0.1, "clip_grad": 1.0},
}
STEPS, RATE = 3, 1e-3
OFFLOAD = {"optimizer_cpu_offload": True, "overlap_cpu_optimizer_d2h_h2d": True, "use_precision_aware_optimizer": True}


def case(name: str, folder: Path, checkpoint: str, rollouts: list[int], bf16: bool, **optimizer: Any) -> Case:
    save = str(folder / name.removesuffix("_second"))
    recipe = {
        **RECIPE,
        "model": {"bf16": bf16},
        "optimizer": {**RECIPE["optimizer"], **optimizer},
        "checkpoint": {"conversion": "direct", "save": save, "load": save},
    }
    return Case(name, checkpoint, {}, recipe, rollouts=rollouts, save_after=rollouts, score=True)


@pytest.fixture(scope="module", params=list(MODELS))
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Of one model: what it computed on the CPU, on the GPU, with its optimizer on the host, resumed, and in bf16."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = str(tiny_hf.write_checkpoint(folder / "hf", MODELS[request.param]))
    on_gpu = [
        case("gpu", folder, checkpoint, [0, 1], False),
        case("offload", folder, checkpoint, [0, 1], True, **OFFLOAD),
        case("stopped", folder, checkpoint, [0], True, **OFFLOAD),
        case("stopped_second", folder, checkpoint, [1], True, **OFFLOAD),
    ]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    on_cpu = [case("cpu", folder, checkpoint, [0, 1], False)]
    return run_cases(on_gpu, 1, folder / "run-gpu") | run_cases(on_cpu, 1, folder / "run-cpu", hidden)


def numbers(result: Result) -> list[dict[str, float]]:
    assert result.error == ""
    return [{n: v for n, v in metrics.items() if not n.startswith("perf/")} for metrics in result.metrics]


def test_the_gpu_trains_as_the_cpu_does(results: dict[str, Result]) -> None:
    for gpu, cpu in zip(numbers(results["gpu"]), numbers(results["cpu"]), strict=True):
        assert gpu == pytest.approx(cpu, rel=5e-3, abs=1e-4)
    for gpu, cpu in zip(results["gpu"].scores, results["cpu"].scores, strict=True):
        assert gpu == pytest.approx(cpu, abs=1e-3)


KNOWN = torch.cuda.is_available() and peak_flops(torch.cuda.get_device_name()) is not None


@pytest.mark.skipif(not KNOWN, reason="needs a GPU of a known peak")
def test_the_share_of_the_gpus_peak_is_logged(results: dict[str, Result]) -> None:
    """Tiny models leave a GPU idle: less than a hundredth of its peak, and more than nothing."""
    for metrics in results["gpu"].metrics:
        assert 0 < metrics["perf/mfu"] < 0.01


def test_a_resumed_run_with_the_optimizer_on_the_host_goes_on(results: dict[str, Result]) -> None:
    """In bf16, where rounding sends tokens to other experts and GPU sums have no order: averages over tokens stay near,
    nearer than what the first rollout moved them by."""
    before, straight = numbers(results["offload"])
    resumed = numbers(results["stopped_second"])[0]
    for name in ("train/kl_loss", "train/train_rollout_logprob_abs_diff"):
        assert abs(resumed[name] - straight[name]) < 0.3 * abs(straight[name] - before[name])


@pytest.mark.parametrize("model", MODELS)
def test_an_optimizer_on_the_host_takes_the_same_steps(model: str) -> None:
    """The same gradients for both, so that nothing but the optimizer can make a difference."""
    device, host = (stepped(model, offload) for offload in ({}, OFFLOAD))
    for name, weight in device.items():
        # Weights are bf16, and so are the gradients that the host gets: a step may differ by their rounding.
        allowed = 2**-7 * weight.abs() + STEPS * RATE * 2**-7
        assert ((host[name] - weight).abs() <= allowed).all(), (name, float((host[name] - weight).abs().max()))


def stepped(model: str, offload: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A model's weights after `STEPS` steps of Adam with gradients that depend on the name and step alone."""
    options = {"lr": RATE, "weight_decay": 0.1, "clip_grad": 1.0, **offload}
    recipe = Recipe(name="test", model={"bf16": True}, optimizer=options)  # type: ignore[arg-type]
    with one_process() as layout:
        chunks = build_model(ModelConfig.from_hf(MODELS[model]), layout, bf16=True)
        fill_from(chunks, MODELS[model], layout)
        optimizer = Optimizer(chunks, recipe, total_steps=STEPS)
        optimizer.reload_master_weights()
        for step in range(STEPS):
            optimizer.zero_grad()
            for name, parameter in chunks[0].named_parameters():
                generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{step}".encode()))
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
            assert not optimizer.step().skipped
        optimizer.check_master_weights()
        optimizer.close()
        return {name: parameter.detach().float().cpu() for name, parameter in chunks[0].named_parameters()}
