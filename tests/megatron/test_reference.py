"""The reference's weights wait on the host and take the model's place while they are asked for."""

from __future__ import annotations

import pytest
import torch

from vime.megatron.reference import HostWeights


class Chunk(torch.nn.Module):
    expert_bias: torch.Tensor
    counter: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), 1.1, dtype=torch.bfloat16))
        self.register_buffer("expert_bias", torch.full((2,), 0.1))
        self.register_buffer("counter", torch.zeros(2), persistent=False)


def state(chunk: Chunk) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in (chunk.weight, chunk.expert_bias, chunk.counter)]


def test_within_the_model_has_the_reference_and_afterwards_its_own_weights_again() -> None:
    chunk = Chunk()
    reference = state(chunk)
    kept = HostWeights([chunk])
    with torch.no_grad():
        for tensor in (chunk.weight, chunk.expert_bias, chunk.counter):
            tensor.mul_(3.7)
    own = state(chunk)
    for _ in range(2):
        with kept.in_place():
            assert torch.equal(chunk.weight, reference[0])
            assert torch.equal(chunk.expert_bias, reference[1])
            assert torch.equal(chunk.counter, own[2])
        assert all(torch.equal(a, b) for a, b in zip(state(chunk), own, strict=True))
    assert kept.bytes == 3 * 2 + 2 * 4


def test_an_error_within_leaves_the_model_its_own_weights() -> None:
    chunk = Chunk()
    kept = HostWeights([chunk])
    with torch.no_grad():
        chunk.weight.zero_()

    def fail() -> None:
        with kept.in_place():
            raise KeyError(float(chunk.weight[0]))

    with pytest.raises(KeyError, match=r"1\.1"):
        fail()
    assert chunk.weight.tolist() == [0.0] * 3


def test_the_exchange_moves_values_and_not_tensors() -> None:
    """The optimizer and the gradient buffers hold on to the parameters."""
    chunk = Chunk()
    address = chunk.weight.data_ptr()
    with HostWeights([chunk]).in_place():
        assert chunk.weight.data_ptr() == address
    assert chunk.weight.data_ptr() == address
