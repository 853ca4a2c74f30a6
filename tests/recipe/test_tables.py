"""The shipped tables of flags against the pinned versions they were made from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from vime.recipe import tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.e2e
def test_the_tables_are_those_of_the_installed_megatron_and_vllm():
    command = [sys.executable, ROOT / "tools" / "make_flag_tables.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=patience.GROUP, check=False)
    assert result.returncode == 0, result.stderr


def test_the_recipes_own_arguments_are_read_as_vllm_means_them():
    assert tables.VLLM_ARGS["enable_expert_parallel"] == "bool"
    assert tables.VLLM_ARGS["data_parallel_size"] == "value"
    assert tables.VLLM_ARGS["speculative_config"] == "value"
    assert {"host", "port", "model", "api_key", "tensor_parallel_size"} <= set(tables.VLLM_OWNED)
    assert not set(tables.VLLM_OWNED) & set(tables.VLLM_ARGS)
