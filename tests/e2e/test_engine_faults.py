"""A real engine killed in a real run: restarted with the trainer's weights, and no sample is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.slurm_cluster import wait_until
from tests.support.small_base import start_run, write_qwen3
from vime.observe.timeline import read_timeline
from vime.run.metrics import read_metrics

pytestmark = pytest.mark.e2e

GROUPS, SAMPLES = 96, 8
FLAGS = (
    *("--num-rollout", "2", "--rollout-batch-size", str(GROUPS), "--over-sampling-batch-size", str(GROUPS)),
    *("--n-samples-per-prompt", str(SAMPLES), "--num-steps-per-rollout", "1", "--rollout-max-response-len", "48"),
    *("--dynamic-sampling-filter-path", "none", "--eval-interval", "none", "--save-debug-rollout-data"),
    *("--lr", "1e-3", "--conversion", "direct", "--check-weight-sync", "0"),
)


def engine_cores(base: Path) -> list[int]:
    """Processes of vLLM that compute, of the engines of a run in this folder."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "vime.rollout.serve" in words and str(base / "tiny-qwen3") in words:
                group = os.getpgid(int(folder.name))
                found += [
                    int(other.name)
                    for other in Path("/proc").glob("[0-9]*")
                    if (other / "comm").read_text().startswith("VLLM::Engine") and os.getpgid(int(other.name)) == group
                ]
        except OSError:
            continue
    return sorted(set(found))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The engine dies in the middle of rollout 1, and again after it."""
    base = tmp_path_factory.mktemp("base")
    write_qwen3(base)
    log, run_dir = base / "submit.log", base / "runs" / "faults"
    process = start_run(base, "faults", *FLAGS, log=log)
    try:

        def past(name: str, rollout: int) -> bool:
            assert process.poll() is None, log.read_text()[-4000:]
            return any((span.name, span.rollout_id) == (name, rollout) for span in read_timeline(run_dir))

        wait_until(lambda: past("sync", 1), patience.TRAINING, lambda: log.read_text()[-2000:])
        time.sleep(0.3)
        (core,) = engine_cores(base)
        assert not past("generate", 1), "the rollout was over before the engine could be killed"
        os.kill(core, signal.SIGKILL)
        wait_until(lambda: past("generate", 1), patience.TRAINING, lambda: log.read_text()[-2000:])
        (core,) = engine_cores(base)
        os.kill(core, signal.SIGKILL)
        assert process.wait(patience.TRAINING) == 0, log.read_text()[-6000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(patience.PROCESS)
    return run_dir, log.read_text()


def samples_of(run_dir: Path, rollout: int) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollouts" / f"{rollout:06d}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("rollout", [0, 1])
def test_every_rollout_has_its_groups_whole_and_every_sample_once(run, rollout):
    samples = samples_of(run[0], rollout)
    first = rollout * GROUPS * SAMPLES
    assert sorted(sample["index"] for sample in samples) == list(range(first, first + GROUPS * SAMPLES))
    for sample in samples:
        assert len(sample["response_ids"]) == len(sample["log_probs"]) == len(sample["weight_versions"]) > 0


@pytest.mark.parametrize("rollout", [0, 1])
def test_every_token_comes_from_the_weights_of_its_rollout(run, rollout):
    versions = {version for sample in samples_of(run[0], rollout) for version in sample["weight_versions"]}
    assert versions == {rollout}


def test_the_requests_of_the_killed_engine_were_repeated(run):
    assert read_metrics(run[0])[1]["rollout/request_retries"] > 0


def test_the_engine_was_restarted_twice_and_its_log_probs_are_the_trainers(run):
    metrics = read_metrics(run[0])
    assert metrics[1]["sync/engine_restarts"] == 2
    assert 0 < metrics[0]["start/sync/train_rollout_logprob_abs_diff"] < 0.1
    for rollout in (0, 1):
        assert 0 < metrics[rollout]["sync/train_rollout_logprob_abs_diff"] < 0.1
        assert 0 < metrics[rollout]["train/train_rollout_logprob_abs_diff"] < 0.1


def test_the_run_says_which_engine_it_restarted_and_why(run):
    log = (run[0] / "logs" / "train" / "node00.log").read_text()
    assert log.count("engine 0 failed (") == 2
