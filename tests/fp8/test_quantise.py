"""Block fp8: the fast paths against the plain formulas, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vime.fp8 import quantise as fp8
from vime.models.config import Quantisation

BLOCKS = st.sampled_from([(128, 128), (64, 128), (32, 48), (1, 16), (7, 5)])
SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300))
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def expand(scale: torch.Tensor, shape: tuple[int, int], block: fp8.Block) -> torch.Tensor:
    return scale.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def plain_scales(weight: torch.Tensor, block: fp8.Block) -> torch.Tensor:
    """Block by block, as the format is defined."""
    rows, columns = fp8.scale_shape(weight.shape, block)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].float()
            scale[i, j] = part.abs().max().clamp(min=1e-10) / 448
    return scale


def weights(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of very different sizes, so that every exponent of e4m3 and its subnormals occur."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-14, 3, shape, generator=generator).float())
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


@settings(max_examples=60, deadline=None)
@given(SHAPES, BLOCKS, DTYPES, st.integers(0, 1000))
def test_quantise_equals_the_definition(shape, block, dtype, seed) -> None:
    weight = weights(shape, dtype, seed)
    q, scale = fp8.quantise(weight, block)
    assert torch.equal(scale, plain_scales(weight, block))
    expected = (weight.float() / expand(scale, shape, block)).to(torch.float8_e4m3fn)
    assert torch.equal(bits(q), bits(expected))


@settings(max_examples=60, deadline=None)
@given(SHAPES, BLOCKS, st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 1000))
def test_dequantise_equals_upcast_and_multiply(shape, block, dtype, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    q = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    exponents = torch.randint(-126, 119, fp8.scale_shape(shape, block), generator=generator).float()
    scale = torch.exp2(exponents) * (1 + torch.rand(exponents.shape, generator=generator))
    expected = (q.float() * expand(scale, shape, block)).to(dtype)
    assert torch.equal(bits(fp8.dequantise(q, scale, block, dtype=dtype)), bits(expected))


def test_every_code_dequantises_and_nan_stays_nan() -> None:
    q = torch.arange(256, dtype=torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 0.37)
    value = fp8.dequantise(q, scale)
    expected = (q.float() * 0.37).to(torch.bfloat16)
    assert torch.equal(value.isnan(), expected.isnan())
    assert value.isnan().sum() == 2
    assert torch.equal(value.nan_to_num(), expected.nan_to_num())


def test_huge_scales_take_the_plain_formula() -> None:
    q = torch.full((4, 4), 1.0).to(torch.float8_e4m3fn)
    scale = torch.full((1, 1), 2.0**125)
    assert torch.equal(fp8.dequantise(q, scale, dtype=torch.float32), torch.full((4, 4), 2.0**125))


def test_a_zero_block_has_the_smallest_scale_and_keeps_the_sign_of_zero() -> None:
    q, scale = fp8.quantise(torch.tensor([[0.0, -0.0]]))
    assert scale.item() == torch.tensor(1e-10).div(448).item()
    assert bits(q).tolist() == [[0x00, 0x80]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(130, 300, dtype=dtype)
    weight[129, 260] = value
    with pytest.raises(fp8.WeightNotFinite, match=r"layers\.3\.w holds NaN or infinity in its block \(1, 2\)"):
        fp8.quantise(weight, name="layers.3.w")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(-60, 60))
def test_ue8m0_scales_are_the_next_power_of_two(seed: int, exponent: int) -> None:
    weight = weights((40, 40), torch.float32, seed) * 2.0**exponent
    _, exact = fp8.quantise(weight, (16, 16))
    q, scale = fp8.quantise(weight, (16, 16), scale_format="ue8m0")
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert bool(((scale >= exact) & (scale < 2 * exact)).all())
    stored = scale.to(torch.float8_e8m0fnu)
    assert torch.equal(fp8.dequantise(q, stored, (16, 16)), fp8.dequantise(q, scale, (16, 16)))


def test_quantised_weights_are_fixed_points() -> None:
    """Numbers that were quantised once quantise to themselves, so a sync of untouched weights changes nothing."""
    weight = weights((200, 300), torch.bfloat16, 1)
    q, scale = fp8.quantise(weight)
    exact = fp8.dequantise(q, scale, dtype=torch.float32)
    again, scale_again = fp8.quantise(exact)
    assert torch.equal(fp8.dequantise(again, scale_again), fp8.dequantise(q, scale))


def test_scales_of_another_shape_are_refused() -> None:
    q, _ = fp8.quantise(torch.zeros(130, 10))
    with pytest.raises(ValueError, match=r"expected \[2, 1\]"):
        fp8.dequantise(q, torch.ones(1, 1))


def test_modules_not_to_convert_are_left_alone() -> None:
    config = Quantisation(modules_to_not_convert=("lm_head", "model.layers.0.self_attn", "eh_proj"))
    assert fp8.is_quantised("model.layers.1.self_attn.o_proj.weight", True, config)
    assert not fp8.is_quantised("model.layers.0.self_attn.o_proj.weight", True, config)
    assert not fp8.is_quantised("model.layers.61.eh_proj.weight", True, config)
    assert not fp8.is_quantised("model.norm.weight", False, config)
    assert not fp8.is_quantised("model.layers.1.self_attn.o_proj.weight", True, None)
