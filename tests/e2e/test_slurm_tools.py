"""Cast and conversion started by srun directly: every rank finds its place in Slurm's environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import patience, tiny_hf
from tests.support.slurm_cluster import DevCluster
from vime.checkpoint.export import export
from vime.checkpoint.hf import HFCheckpoint

pytestmark = pytest.mark.e2e

TOOLS = Path(__file__).parents[2] / "tools"


def srun(*command: str) -> str:
    """Output of two tasks on two nodes, with nothing of a launcher in their environment."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    argv = ["srun", "-N2", "-n2", "--ntasks-per-node=1", "-c1", "--mem=3000", "-t5", "--kill-on-bad-exit=1"]
    done = subprocess.run(
        [*argv, sys.executable, *command], env=env, capture_output=True, text=True, timeout=patience.GROUP, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_cast_and_conversion_by_two_nodes(four_nodes: DevCluster, tmp_path: Path) -> None:
    source = tiny_hf.write_checkpoint(tmp_path / "fp8", tiny_hf.with_fp8(tiny_hf.DEEPSEEK), files=4)
    said = srun(
        *(str(TOOLS / "fp8_cast_bf16.py"), "--input-fp8-hf-path", str(source)),
        *("--output-bf16-hf-path", str(tmp_path / "bf16"), "--threads", "1"),
    )
    assert "cast, rank 0 of 2: 100%" in said
    assert "cast, rank 1 of 2: 100%" in said
    layout = ("--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "1")
    paths = ("--hf-checkpoint", str(source), "--save", str(tmp_path / "torch_dist"))
    said = srun(str(TOOLS / "convert_hf_to_torch_dist.py"), *layout, *paths)
    assert "convert, rank 1 of 2: 100%" in said
    assert said.count("release is complete") == 1
    export(tmp_path / "torch_dist", source, tmp_path / "back")
    cast, back, fp8 = (HFCheckpoint(tmp_path / name) for name in ("bf16", "back", "fp8"))
    assert cast.tensors.keys() == back.tensors.keys()
    for name in cast.tensors:
        assert torch.equal(cast.tensor(name), back.tensor(name)), name
        assert torch.equal(cast.tensor(name), fp8.tensor(name)), name
