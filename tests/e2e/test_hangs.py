"""A real run, without engines, of which a rank is stopped: found, named with its phase, all stacks in the log."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.slurm_cluster import wait_until
from tests.support.small_base import start_run, write_qwen3
from tests.support.small_rollouts import rollout_of
from vime.errors import Cause
from vime.observe.samples import write_samples
from vime.run.journal import read_events
from vime.run.metrics import read_metrics
from vime.train.deadlines import PhaseDeadlines
from vime.train.pulse import BEAT_S, STACKS_S

pytestmark = pytest.mark.e2e

ROLLOUTS = 400
FLAGS = (
    *("--num-rollout", str(ROLLOUTS), "--rollout-batch-size", "8", "--over-sampling-batch-size", "8"),
    *("--n-samples-per-prompt", "4", "--num-steps-per-rollout", "1", "--dynamic-sampling-filter-path", "none"),
    *("--eval-interval", "none", "--conversion", "direct", "--actor-num-gpus-per-node", "2"),
)
FOUND_S = PhaseDeadlines().silent + STACKS_S + 3 * BEAT_S
ENDED_S = patience.SLURM
"""Engines stop, Ray ends, and the last word is written."""


def pid_of_rank(log: str, rank: int) -> int:
    """Process of a rank: Ray writes it before each of the rank's lines."""
    return int(re.findall(rf"\(rank {rank} on node \d+ pid=(\d+)", log)[-1])


def test_a_stopped_rank_ends_the_run_with_its_rank_and_phase(tmp_path: Path) -> None:
    write_qwen3(tmp_path)
    rollout, _ = rollout_of([[1.0, 0.0, 0.0, 1.0]] * 8, [40, 60])
    for number in range(ROLLOUTS):
        write_samples(tmp_path, dataclasses.replace(rollout, rollout_id=number), everything=True)
    flags = (*FLAGS, "--load-debug-rollout-data", str(tmp_path / "rollouts"))
    log, run_dir = tmp_path / "submit.log", tmp_path / "runs" / "hang"
    process = start_run(tmp_path, "hang", *flags, log=log)
    try:

        def trained() -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            return len(read_metrics(run_dir)) >= 2

        wait_until(trained, patience.TRAINING, lambda: log.read_text()[-2000:])
        train_log = run_dir / "logs" / "train" / "node00.log"
        os.kill(pid_of_rank(train_log.read_text(), 1), signal.SIGSTOP)
        begin = time.monotonic()
        assert process.wait(FOUND_S + ENDED_S) == Cause.CRASH, log.read_text()[-4000:]
        print(f"ended {time.monotonic() - begin:.0f} s after the stop")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(patience.PROCESS)
    end = read_events(run_dir)[-1]
    assert (end.kind, end.data["cause"], end.rank) == ("run-end", "CRASH", 1)
    assert re.search(r"rank 1: gave no sign of life for \d+ s in phase \w+", end.text)
    assert re.search(r"\(rank 0 .*most recent call first", train_log.read_text())
