"""The shim for machines without CUDA reaches Megatron alone: any other library of the process meets torch as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import tiny_hf
from vime.megatron import backend

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for machines without CUDA")


@pytest.fixture(autouse=True)
def _installed() -> None:
    assert backend.setup().cpu


@pytest.mark.parametrize("hf", [tiny_hf.QWEN3, tiny_hf.DEEPSEEK], ids=["qwen3", "deepseek-v3"])
def test_transformers_loads_a_model_with_the_right_frequencies(hf: dict, tmp_path: Path) -> None:
    """They are in no checkpoint: from_pretrained computes them anew after building the model on no device."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = tiny_hf.write_folder(tmp_path / "model", hf, tiny_hf.random_tensors(hf, dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    assert found
    for frequencies in found.values():
        width = 2 * len(frequencies)
        rope = model.config.rope_parameters
        if rope["rope_type"] == "default":
            expected = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        else:
            expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](model.config, torch.device("cpu"))
        assert torch.equal(frequencies, expected)


def test_the_device_context_of_torch_holds() -> None:
    with torch.device("meta"):
        assert {torch.arange(3).device.type, torch.empty(2).device.type, torch.full((2,), 1.0).device.type} == {"meta"}


def test_cuda_is_as_absent_as_it_is() -> None:
    assert torch.zeros(1).type() == "torch.FloatTensor"
    for call in (
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.zeros(1).to("cuda"),
        lambda: torch.zeros(1).cuda(),
        torch.cuda.current_device,
        torch.cuda.get_rng_state,
    ):
        with pytest.raises((AssertionError, RuntimeError)):
            call()


def test_megatron_meets_a_processor_in_its_place() -> None:
    code = "import torch\nfound = (torch.zeros(1, device='cuda').device.type, torch.cuda.current_device(), "
    code += "torch.zeros(1).type(), torch.nn.Linear(1, 1).cuda().weight.device.type)"
    space = {"__name__": "megatron.core.made_up"}
    exec(code, space)
    assert space["found"] == ("cpu", torch.device("cpu"), "torch.cuda.FloatTensor", "cpu")
