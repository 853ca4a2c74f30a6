"""The learning rate's schedule, and what is said about flags without effect."""

from __future__ import annotations

from typing import Any

import pytest

from vime.errors import BadInput
from vime.megatron.optimizer import _values, learning_rate, notes
from vime.recipe.schema import OptimizerOptions


def rates(steps: int, **options: Any) -> list[float]:
    chosen = OptimizerOptions(lr=1.0, **options)
    return [learning_rate(chosen, step, steps) for step in range(steps + 1)]


def test_a_constant_rate_is_constant_after_the_warm_up() -> None:
    assert rates(6, lr_warmup_iters=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]


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


def test_a_smallest_rate_above_the_rate_is_refused() -> None:
    with pytest.raises(BadInput, match=r"--min-lr 1\.0 is above --lr"):
        _values(OptimizerOptions(lr=1e-6, min_lr=1.0), bf16=True, cpu=True)
