"""Runs of the conversion tool, and of programs in several processes under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import patience

TOOL = Path(__file__).parents[2] / "tools" / "convert_hf_to_torch_dist.py"


def torchrun(processes: int, *command: str) -> None:
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # torchrun leaves a folder of logs; its path has to be short, since sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="vt-") as scratch:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": scratch}
        done = subprocess.run(
            [*runner, *command], env=env, capture_output=True, text=True, timeout=patience.GROUP, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
