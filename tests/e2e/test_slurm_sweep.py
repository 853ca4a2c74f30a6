"""A sweep on a real Slurm: nothing is queued unless all of it can be, never more than K run, and what is missing comes.

Planning, checks, submission, jobs, controllers and preflight are real; training is a stub that writes rewards.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.slurm_cluster import DevCluster, wait_until
from tests.support.stub_training import FAILS_FIRST
from vime.run.jobs import read_jobs
from vime.slurm import queue as slurm

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
AT_ONCE = 2
RUNS = [f"rates-{number:03d}" for number in range(5)]
FILE = """
name: rates
submit: --recipe tiny-qwen3 --time 10 --cluster {profile} --base-dir {base}
flags: --num-rollout 3 --rollout-batch-size 8 --over-sampling-batch-size 8
at-once: 2
grid:
  lr: [1e-6, 2e-6, 3e-6, 4e-6, 5e-6]
"""
LARGER = "list: [{actor-num-nodes: 1}, {actor-num-nodes: 40}]\n"


@pytest.fixture
def file(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    profile = tmp_path / "stub.yaml"
    # Nodes report the memory of one machine: like the profile of the development cluster.
    profile.write_text(
        "kind: tests.support.stub_training:StubTraining\n"
        "gpu-request: none\ngpus-per-node: 0\nexclusive: false\nmem: null\ncpus-per-node: 1\n"
    )
    path = tmp_path / "rates.yaml"
    path.write_text(FILE.format(profile=profile, base=base_dir))
    return path


def sweep(*words: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "vime.sweep", *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=patience.GROUP)


def queued(*states: str) -> Counter[str]:
    """Jobs of the sweep in the queue by name, of these states or of all."""
    wanted = ["-t", ",".join(states)] if states else []
    names = slurm.call("squeue", "-h", "-o", "%j", *wanted).split()
    return Counter(name for name in names if name.startswith("rates-"))


def states(file: Path) -> dict[str, str]:
    """State of every run, as the table of `--status` has it."""
    rows = sweep(file, "--status").stdout.splitlines()[1:]
    return {row.split()[0]: re.split(r"  +", row)[2] for row in rows}


def most_at_once(seconds: float) -> int:
    """The most jobs of the sweep that ran together until its last one had ended."""
    seen = [0]

    def over() -> bool:
        seen.append(sum(queued("RUNNING").values()))
        return not queued()

    wait_until(over, seconds, lambda: slurm.call("squeue"))
    return max(seen)


def interrupted_after(file: Path, jobs: int) -> int:
    """Exit code of a sweep that got Ctrl-C when it had submitted this many jobs."""
    argv = [sys.executable, "-u", "-m", "vime.sweep", str(file)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            jobs -= line.startswith("job ")
            if not jobs:
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        return process.wait(patience.PROCESS)


def test_a_variant_that_slurm_could_not_run_keeps_all_out_of_the_queue(
    four_nodes: DevCluster, file: Path, base_dir: Path
) -> None:
    file.write_text(file.read_text() + LARGER)
    done = sweep(file)
    assert done.returncode == 2
    assert done.stderr.startswith("error: variant 001 (--lr 1e-6 --actor-num-nodes 40): "), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not queued()
    assert not (base_dir / "runs").exists()


def test_an_interrupted_sweep_goes_on_with_what_is_missing_and_never_runs_more_than_its_limit(
    four_nodes: DevCluster, file: Path, base_dir: Path
) -> None:
    folder = base_dir / "runs" / "rates"
    assert interrupted_after(file, 2) == 130
    first = {name: read_jobs(folder / name) for name in RUNS}
    assert all(first[name] for name in RUNS[:2])
    assert queued().keys() == {name for name in RUNS if first[name]}

    done = sweep(file)
    assert done.returncode == 0, done.stderr
    assert set(queued().values()) == {1}
    assert all(read_jobs(folder / name) for name in RUNS)
    assert all(read_jobs(folder / name) == first[name] for name in RUNS if first[name])
    # One that is cancelled while it waits does not let those behind it start: the one before it runs yet.
    slurm.cancel(read_jobs(folder / RUNS[2])[0].job_id)
    assert most_at_once(patience.JOB) == AT_ONCE
    ended = {**dict.fromkeys(RUNS, "succeeded"), RUNS[1]: "failed", RUNS[2]: "cancelled"}
    assert FAILS_FIRST == 2e-6
    assert states(file) == ended

    done = sweep(file)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("run rates")] == [
        f"{name}:" for name in RUNS[1:3]
    ]
    assert most_at_once(patience.JOB) == AT_ONCE
    assert states(file) == dict.fromkeys(RUNS, "succeeded")
    done = sweep(file)
    assert (done.returncode, queued()) == (0, Counter())
    rows = done.stdout.splitlines()
    assert len(rows) == 1 + len(RUNS)
    assert re.split(r"  +", rows[-1])[4:] == ["3/3", "1.5"]

    assert sweep(file, "--report").stdout == f"{len(RUNS)} runs compared: {folder / 'compare.html'}\n"
    page = (folder / "compare.html").read_text()
    assert "<td>lr</td>" + "".join(f"<td>{rate}e-06</td>" for rate in range(1, 6)) in page
    curves = page.split("<figcaption>Mean reward")[1].split("</figure>")[0]
    assert curves.count("<polyline") == len(RUNS)
    for name in RUNS:
        four_nodes.assert_nothing_is_left(read_jobs(folder / name)[0].job_id, folder / name)
