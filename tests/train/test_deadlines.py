"""Deadlines of a cold start grow with the bytes that are loaded."""

from __future__ import annotations

from pathlib import Path

from tests.support.launch_stub import make_plan, stub
from vime.run.plan import Artefact
from vime.train.deadlines import PhaseDeadlines


def test_loading_and_saving_have_the_time_their_bytes_take_on_a_slow_file_system(tmp_path: Path) -> None:
    def deadlines(size: int) -> PhaseDeadlines:
        inputs = (
            Artefact(name="hf-checkpoint", path="/hf", kind="hf", bytes=size),
            Artefact(name="torch-dist", path="/dist", kind="torch_dist", bytes=2 * size),
        )
        outputs = (Artefact(name="checkpoints", path="/saves", kind="run", bytes=14 * size),)
        train = stub("train", "pass", inputs=inputs, outputs=outputs)
        return PhaseDeadlines.of(make_plan(tmp_path, [train], nodes=4))

    small, large = deadlines(0), deadlines(4 * 10**11)
    assert small == PhaseDeadlines()
    assert large.setup - small.setup == 2000
    assert large.engine_start - small.engine_start == 4000
    assert large.save - small.save == 14000
    assert (large.train, large.sync) == (small.train, small.sync)
