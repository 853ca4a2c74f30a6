"""A config.json that describes no model: one clear error, and no memory taken on its word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_hf
from vime.errors import BadInput
from vime.models.config import ModelConfig

CHANGES: dict[str, dict[str, Any]] = {
    "layers far too many": {"num_hidden_layers": 10**9},
    "layers negative": {"num_hidden_layers": -1},
    "layers as text": {"num_hidden_layers": "61"},
    "layers as a fraction": {"num_hidden_layers": 1.5},
    "layers without end": {"num_hidden_layers": float("inf")},
    "no heads": {"num_attention_heads": 0},
    "no width": {"hidden_size": 0},
    "a vocabulary of 10^18": {"vocab_size": 10**18},
    "true": {"hidden_size": True},
    "rope as text": {"rope_scaling": "x"},
    "blocks of nothing": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}},
    "negative blocks": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [-1, 128]}},
    "blocks as text": {"quantization_config": {"quant_method": "fp8", "weight_block_size": "ab"}},
    "architecture as a number": {"architectures": 5},
    "architectures as objects": {"architectures": [{}]},
    "nothing": dict.fromkeys(tiny_hf.DEEPSEEK),
}


@pytest.mark.parametrize("name", CHANGES)
def test_values_that_no_model_has_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**tiny_hf.DEEPSEEK, **CHANGES[name]}))
    with pytest.raises(BadInput) as refusal:
        ModelConfig.from_folder(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", b"[]", b'{"a":' + b"9" * 5000 + b"}", b"\0" * 9])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_the_models_of_the_tests_are_believed() -> None:
    for hf in (tiny_hf.DEEPSEEK, tiny_hf.QWEN3, tiny_hf.QWEN3_MOE):
        ModelConfig.from_hf(hf)
