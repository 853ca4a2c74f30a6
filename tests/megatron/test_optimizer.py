"""Learning rates against Megatron's scheduler, steps against torch's AdamW, and notes about flags without effect."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.single import MODELS, built, one_process
from vime.checkpoint.allowed import read_common
from vime.megatron import backend
from vime.megatron.megatron_lm import optimizer_common
from vime.megatron.optimizer import Optimizer, _values, learning_rate, notes
from vime.recipe.schema import ModelOptions, OptimizerOptions, Recipe


def rates(steps: int, **options: Any) -> list[float]:
    chosen = OptimizerOptions(lr=1.0, **options)
    return [learning_rate(chosen, step, steps) for step in range(steps + 1)]


def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    assert rates(6, lr_warmup_iters=4) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "end"), [(0, 7), (3, 7), (1, 12)])
def test_every_rate_is_that_of_megatrons_scheduler(style: str, warmup: int, end: int) -> None:
    backend.setup()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    groups: list[dict[str, Any]] = [{"params": []}]
    scheduler = OptimizerParamScheduler(
        SimpleNamespace(param_groups=groups),  # type: ignore[arg-type]
        init_lr=0.0,
        max_lr=1.0,
        min_lr=0.1,
        lr_warmup_steps=warmup,
        lr_decay_steps=end,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    theirs = []
    for _ in range(11):
        theirs.append(groups[0]["lr"])
        scheduler.step(1)
    ours = rates(10, lr_warmup_iters=warmup, lr_decay_iters=end, lr_decay_style=style, min_lr=0.1)
    assert ours == pytest.approx(theirs)


def test_the_checkpoint_of_an_optimizer_on_the_host_is_read_again(tmp_path: Path) -> None:
    """Groups of Megatron's hybrid optimizer name classes, and a pickle that names one is refused on resume."""
    backend.setup()
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    hybrid = HybridDeviceOptimizer(
        [{"params": [torch.nn.Parameter(torch.ones(4))], "wd_mult": 0.0}],
        offload_fraction=1.0,
        cpu_optimizer_cls=torch.optim.AdamW,
        gpu_optimizer_cls=torch.optim.AdamW,
        param_update_in_fp32=True,
        pin_cpu_grads=False,
        pin_cpu_params=False,
        overlap_cpu_optimizer_d2h_h2d=False,
        lr=1e-3,
        betas=(0.9, 0.98),
    )
    assert hybrid.param_groups[0]["cpu_optimizer_cls"] is torch.optim.AdamW
    torch.save(optimizer_common(SimpleNamespace(optimizer=hybrid), 3), tmp_path / "common.pt")
    (group,) = read_common(tmp_path / "common.pt")["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["wd_mult"], group["step"]) == (1e-3, (0.9, 0.98), 0.0, 3)


@pytest.mark.parametrize("model", ["qwen3", "deepseek"])
def test_three_steps_are_torchs_adamw_with_decay_on_matrices_alone(model: str) -> None:
    options = OptimizerOptions(lr=1e-2, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9, clip_grad=0.0)
    recipe = Recipe(name="r", model=ModelOptions(bf16=False), optimizer=options)
    draw = torch.Generator().manual_seed(0)
    with one_process() as layout:
        ours = Optimizer(built(MODELS[model], layout), recipe, total_steps=3)
        parameters = dict(ours.chunks[0].module.named_parameters())
        copies = {name: torch.nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
        decayed = [copy for copy in copies.values() if copy.dim() > 1]
        kept = [copy for copy in copies.values() if copy.dim() == 1]
        theirs = torch.optim.AdamW(
            [{"params": decayed}, {"params": kept, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.5, betas=(0.8, 0.9)
        )
        assert any("norm" in name for name in parameters)
        for _ in range(3):
            ours.zero_grad()
            for name, parameter in parameters.items():
                gradient = torch.randn(parameter.shape, generator=draw)
                parameter.main_grad.copy_(gradient)
                copies[name].grad = gradient
            ours.step()
            theirs.step()
        for name, parameter in parameters.items():
            assert torch.allclose(parameter, copies[name], rtol=1e-6, atol=1e-7), name
        ours.close()


def test_a_linear_rate_reaches_the_smallest_at_the_end() -> None:
    assert rates(4, lr_decay_style="linear", min_lr=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_cosine_rate_is_half_way_in_the_middle_and_stays_at_its_end() -> None:
    found = rates(8, lr_decay_style="cosine", lr_decay_iters=4)
    assert found[2] == pytest.approx(0.5)
    assert found[4:] == pytest.approx([0.0] * 5)


def test_flags_of_the_host_optimizer_are_accepted_and_said_to_do_nothing_on_a_cpu() -> None:
    options = OptimizerOptions(optimizer_cpu_offload=True, use_precision_aware_optimizer=True)
    (note,) = notes(options, cpu=True)
    assert "--optimizer-cpu-offload, --use-precision-aware-optimizer" in note
    assert notes(options, cpu=False) == []
    assert "optimizer_cpu_offload" not in _values(options, bf16=True, cpu=True)
    assert _values(options, bf16=True, cpu=False)["optimizer_offload_fraction"] == 1.0
