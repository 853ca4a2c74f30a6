"""Scales of a block-fp8 folder: one for every fp8 tensor, none too many, all finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_hf import DEEPSEEK, random_tensors, stored_tensors, with_fp8, write_folder
from vime.errors import BadInput
from vime.models.scales import check_scales

HF = with_fp8(DEEPSEEK)
WEIGHT = "model.layers.0.self_attn.o_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def stored() -> Tensors:
    return stored_tensors(HF, random_tensors(HF))


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def with_last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scale: torch.Tensor) -> torch.Tensor:
        spoilt = scale.clone()
        spoilt[-1, -1] = value
        return spoilt

    return change


SPOILT: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no scale": (lambda tensors: tensors.pop(SCALE), f"{WEIGHT} is stored in fp8 but no file has {SCALE}"),
    "a scale too many": (
        lambda tensors: tensors.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}),
        "model.norm.weight_scale_inv is a scale, but model.norm.weight is stored as BF16, not in fp8",
    ),
    "a scale of nothing": (
        lambda tensors: tensors.update({"model.other.weight_scale_inv": torch.ones(1, 1)}),
        "model.other.weight_scale_inv is a scale, but no file has model.other.weight",
    ),
    "NaN": (put(SCALE, with_last(float("nan"))), f"{SCALE} holds NaN or infinity"),
    "infinity in bf16": (
        put(SCALE, lambda scale: with_last(float("inf"))(scale).to(torch.bfloat16)),
        f"{SCALE} holds NaN or infinity",
    ),
    "NaN in e8m0": (
        put(SCALE, lambda scale: with_last(float("nan"))(scale).to(torch.float8_e8m0fnu)),
        f"{SCALE} holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_scale_is_named_with_its_file(tmp_path: Path, stored: Tensors, kind: str) -> None:
    spoil, said = SPOILT[kind]
    tensors = dict(stored)
    spoil(tensors)
    folder = write_folder(tmp_path / "hf", HF, tensors, files=3)
    with pytest.raises(BadInput, match=r"model-0000\d-of-00003\.safetensors: .*") as caught:
        check_scales(folder, quantised=True)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_whole_scales_of_every_type_pass(tmp_path: Path, stored: Tensors, kind: torch.dtype) -> None:
    tensors = {name: value.to(kind) if name.endswith("_scale_inv") else value for name, value in stored.items()}
    check_scales(write_folder(tmp_path / "hf", HF, tensors, files=2), quantised=True)


def test_fp8_without_its_configuration_is_refused(tmp_path: Path, stored: Tensors) -> None:
    folder = write_folder(tmp_path / "hf", DEEPSEEK, stored, files=1)
    with pytest.raises(BadInput, match=r"is stored in fp8 but config\.json has no quantization_config"):
        check_scales(folder, quantised=False)


def test_a_plan_reads_the_first_values_alone_and_misses_nothing_of_a_fetch_under_way(
    tmp_path: Path, stored: Tensors
) -> None:
    folder = write_folder(tmp_path / "hf", HF, stored, files=3)
    file = next(path for path in folder.glob("*.safetensors") if SCALE in load_file(path))
    tensors = load_file(file)
    tensors[SCALE] = with_last(float("nan"))(tensors[SCALE])
    save_file(tensors, file)
    check_scales(folder, quantised=True, most=0)
    for other in set(folder.glob("*.safetensors")) - {file}:
        other.unlink()
    check_scales(folder, quantised=True, most=0)
    file.unlink()
    check_scales(folder, quantised=True)
