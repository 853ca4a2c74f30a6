"""Operations of training against hand-made sums, and utilisation only where the device's peak is known."""

import pytest

from tests.support.hf_configs import DEEPSEEK_R1, QWEN3_4B, QWEN3_30B_A3B
from vime.models.config import ModelConfig
from vime.models.flops import active_parameters, peak_flops, training_flops, utilisation

R1, DENSE, SPARSE = (ModelConfig.from_hf(hf) for hf in (DEEPSEEK_R1, QWEN3_4B, QWEN3_30B_A3B))


def test_active_parameters_are_those_that_the_models_are_named_after():
    # R1 activates 37 B, less its embedding of 0.93 B, which is looked up and not multiplied; 30B-A3B activates 3.3 B.
    assert active_parameters(R1) == pytest.approx(36.6e9, rel=0.01)
    assert active_parameters(SPARSE) == pytest.approx(3.04e9, rel=0.02)
    # A tied head is multiplied, so the whole of the dense model counts.
    assert active_parameters(DENSE) == pytest.approx(4.02e9, rel=0.001)


def test_one_token_costs_six_operations_a_parameter_and_attention_grows_with_the_square():
    assert training_flops(DENSE, [1]) == pytest.approx(6 * active_parameters(DENSE), rel=1e-4)
    # 36 layers, 32 heads, 128 wide queries and values, causal: 3 x 36 x 32 x 256 x n².
    attention = training_flops(DENSE, [32768]) - 32768 * 6 * active_parameters(DENSE)
    assert attention == pytest.approx(3 * 36 * 32 * 256 * 32768**2)
    assert training_flops(DENSE, [100, 100]) < training_flops(DENSE, [200])


def test_utilisation_is_a_share_of_the_peak_of_all_gpus():
    seconds = training_flops(DENSE, [8192]) / (2 * 989e12) / 0.4
    assert utilisation(DENSE, [8192], seconds=seconds, gpus=2, device="NVIDIA H100 80GB HBM3") == pytest.approx(0.4)


def test_nothing_is_said_of_a_device_whose_peak_is_not_known():
    assert peak_flops("some new chip") is None
    assert utilisation(DENSE, [8192], seconds=1, gpus=1, device="") is None
