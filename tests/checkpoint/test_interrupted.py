"""Cast and conversion killed at any byte: nothing looks complete, and a second run resumes where the first one was."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import patience, tiny_hf
from vime.checkpoint.cast import output_shards
from vime.checkpoint.export import export
from vime.checkpoint.hf import HFCheckpoint

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parents[1] / "support"
POINTS = 8


def killed(tool: str, source: Path, folder: Path, points: list[int]) -> list[dict]:
    command = [sys.executable, str(HERE / "killed_process.py"), tool, str(source), str(folder), *map(str, points)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience.LEARNING, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def same_values(one: Path, two: Path) -> bool:
    a, b = HFCheckpoint(one), HFCheckpoint(two)
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensor(n), b.tensor(n)) for n in a.tensors)


@pytest.mark.parametrize("tool", ["cast", "convert"])
def test_killed_at_any_byte(tmp_path: Path, tool: str) -> None:
    source = tiny_hf.write_checkpoint(tmp_path / "fp8", tiny_hf.with_fp8(tiny_hf.DEEPSEEK), files=6)
    total = sum(shard.bytes for shard in output_shards(HFCheckpoint(source)))
    generator = random.Random(0)
    # All over the tensors, and densely where the small files are written and renamed.
    points = sorted({1, 2, 3, *(generator.randrange(4, total) for _ in range(POINTS))})
    points += sorted({generator.randrange(total, int(1.1 * total)) for _ in range(POINTS)})
    folder = tmp_path / "out"
    folder.mkdir()
    ends = killed(tool, source, folder, points)
    assert sum(end["code"] == 137 for end in ends) > POINTS
    kept = 0
    for end in ends:
        if end["code"] == 137:
            assert not end["complete"], end
        assert end["again"] == 0, end
        assert all(end["kept"].values()), end
        assert end["left"] == [], end
        kept += len(end["kept"])
    assert kept > POINTS
    # All came to the same.
    results = [folder / f"{tool}-{point}" for point in points]
    if tool == "convert":
        for result in results:
            export(result, source, result / "hf")
        results = [result / "hf" for result in results]
    assert all(same_values(results[0], result) for result in results[1:])
    whole = HFCheckpoint(source)
    back = HFCheckpoint(results[0])
    assert all(torch.equal(whole.tensor(name), back.tensor(name)) for name in back.tensors)
