"""Block fp8 on a GPU: every path gives the bytes of the CPU's, whatever the weights are."""

from __future__ import annotations

import pytest
import torch

from vime.fp8 import quantise as fp8

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPES = ((128, 128), (256, 512), (1, 1), (130, 300), (257, 129), (64, 1000), (576, 256))
"""Whole blocks, edge blocks in one and both dimensions, rows of odd lengths."""


def random(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    spread = torch.exp2(torch.randint(-14, 3, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def negative_zeros(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.where(random(shape, torch.float32) > 0, random(shape, torch.float32), -0.0).to(dtype)


def zero_blocks(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    values = random(shape, torch.float32)
    values[:128, :128] = -0.0
    values[-1, -1] = 0.0
    return values.to(dtype)


def subnormal(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return (random(shape, torch.float32) * 2.0**-133).to(dtype)


def subnormal_and_large(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.where(random(shape, torch.float32) > 0, random(shape, torch.float32), subnormal(shape, dtype)).to(
        dtype
    )


def codes_between(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Quotients half-way between two codes and one unit in the last place to both sides."""
    halfway = torch.linspace(-448, 448, shape[0] * shape[1]).to(torch.float8_e4m3fn).float()
    nudged = halfway * 1.0625 * (1 + (torch.arange(halfway.numel()) % 3 - 1) * 2.0**-23)
    return nudged.clamp(-448, 448).view(shape).to(dtype)


def largest(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.where(random(shape, torch.float32) > 0, torch.finfo(dtype).max, -torch.finfo(dtype).tiny).to(dtype)


def from_a_checkpoint(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Weights that were stored in block fp8: their small negative numbers are negative zeros."""
    stored = fp8.quantise(random(shape, torch.float32))
    weight = fp8.dequantise(*stored, dtype=torch.float32)
    assert weight.numel() < 100 or bool(((weight == 0) & weight.signbit()).any())
    return weight.to(dtype)


KINDS = (
    random, negative_zeros, zero_blocks, subnormal, subnormal_and_large, codes_between, largest, from_a_checkpoint,
)  # fmt: skip
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def assert_same(weight: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, what: str) -> None:
    wanted, wanted_scale = fp8.quantise(weight)
    assert torch.equal(scale.cpu().view(torch.int32), wanted_scale.view(torch.int32)), f"scales of {what}"
    ours, theirs = q.cpu().view(torch.uint8), wanted.view(torch.uint8)
    wrong = (ours != theirs).nonzero()
    assert not len(wrong), (
        f"{what} at {wrong[0].tolist()}: {ours[tuple(wrong[0])]:#x}, not {theirs[tuple(wrong[0])]:#x}"
    )


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_for_a_table_of_matrices(kind, dtype) -> None:
    from vime.fp8.gpu_kernels import quantise_many

    weights = [kind(shape, dtype) for shape in SHAPES]
    found = quantise_many([weight.cuda() for weight in weights])
    for weight, q, scale in zip(weights, *found, strict=True):
        assert_same(weight, q, scale, f"{kind.__name__} {tuple(weight.shape)}")


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_matrix_by_the_formula(kind, dtype, shape) -> None:
    weight = kind(shape, dtype)
    assert_same(weight, *fp8.quantise(weight.cuda()), kind.__name__)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_again(kind, dtype) -> None:
    from vime.fp8.gpu_kernels import dequantise_many

    stored = [fp8.quantise(kind(shape, dtype)) for shape in SHAPES]
    found = dequantise_many([q.cuda() for q, _ in stored], [scale.cuda() for _, scale in stored])
    for (q, scale), ours in zip(stored, found, strict=True):
        theirs = fp8.dequantise(q, scale)
        assert torch.equal(ours.cpu().view(torch.int16), theirs.view(torch.int16))
        alone = fp8.dequantise(q.cuda(), scale.cuda())
        assert torch.equal(alone.cpu().view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_flagged_for_its_matrix_alone(value) -> None:
    from vime.fp8.gpu_kernels import block_table, launch_quantise

    weights = [torch.zeros(130, 300, device="cuda") for _ in range(3)]
    weights[1][129, 260] = value
    codes = [torch.empty(130, 300, dtype=torch.float8_e4m3fn, device="cuda") for _ in weights]
    scales = [torch.empty(2, 3, device="cuda") for _ in weights]
    table = block_table(weights, codes, scales, 128)
    launch_quantise(table, torch.float32)
    assert table.wrong.tolist() == [0, 1, 0]
