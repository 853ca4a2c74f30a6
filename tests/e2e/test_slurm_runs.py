"""Runs of stub stages as jobs of a real Slurm: how they end, and that nothing of them is left."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import patience
from tests.support.launch_stub import MINUTES, make_plan, preflight, ray_stages, service, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event, wait_until
from vime import cancel, logs, status
from vime.run.folder import read_binding
from vime.run.journal import read_events
from vime.run.plan import Stage
from vime.run.registry import record_run
from vime.schedulers.batch_script import sbatch_text
from vime.schedulers.submission import submit
from vime.slurm import queue as slurm
from vime.slurm.sbatch import check_accepted

pytestmark = pytest.mark.e2e

TRAINING = "print('training', flush=True); import time; time.sleep(3600)"


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / 'it\'s a "run" & größe $HOME'


def start(run_dir: Path, *stages: Stage, nodes: int = 4, **options: Any) -> str:
    """Submits a run; the job's id."""
    plan = make_plan(run_dir, [preflight(run_dir, nodes), *stages], nodes=nodes, kind="slurm", **options)
    record_run(run_dir)
    check_accepted([sbatch_text(plan)])
    return submit(plan)


def test_a_run_succeeds_with_services_on_all_nodes(four_nodes: DevCluster, run_dir: Path) -> None:
    ranks = "import os; print(os.uname().nodename, os.environ['RANK'], os.environ['MASTER_ADDR'], flush=True)"
    stages = (
        service("ray-head"),
        service("ray-workers", nodes=(1, 2, 3)),
        stub("convert", ranks, nodes=range(4), tasks_per_node=2, cpus_per_task=1),
        stub("train", "print('done')"),
    )
    asked = time.time()
    job = start(run_dir, *stages)
    assert wait_for_end(job, patience.JOB) == "COMPLETED"
    binding = read_binding(run_dir)
    assert [(node.host, node.address) for node in binding.nodes] == [(f"node0{i}", f"10.77.0.{i}") for i in range(1, 5)]
    assert binding.end_time is not None
    assert asked - 60 < binding.end_time - 60 * MINUTES < time.time() + 60
    said = [path.read_text().split()[2:] for path in sorted((run_dir / "logs" / "convert").glob("node*.log"))]
    assert said == [[f"node0{rank // 2 + 1}", str(rank), "10.77.0.1"] for rank in range(8)]
    four_nodes.assert_nothing_is_left(job, run_dir)


def test_the_first_failure_is_the_runs_last_word(four_nodes: DevCluster, run_dir: Path) -> None:
    code = "import os, time; time.sleep(0 if os.environ['RANK'] == '2' else 300); raise SystemExit('shard 3 is cut')"
    job = start(run_dir, service("ray-head"), stub("convert", code, nodes=range(4)), stub("train", "pass"))
    assert wait_for_end(job, patience.JOB) == "FAILED"
    end = read_events(run_dir)[-1]
    assert (end.kind, end.stage, end.node, end.rank) == ("run-end", "convert", "node03", 2)
    assert end.data["cause"] == "CODE_ERROR"
    assert "shard 3 is cut" in end.text
    assert "shard 3 is cut" in end.data["log_tail"]
    four_nodes.assert_nothing_is_left(job, run_dir)


def test_the_exit_code_tells_the_cause(four_nodes: DevCluster, run_dir: Path) -> None:
    job = start(run_dir, stub("train", "raise SystemExit(18)"), nodes=1)
    assert wait_for_end(job, patience.SLURM) == "FAILED"
    # Accounting hears of a job's end a little later.
    wait_until(lambda: "18:0" in slurm.call("sacct", "-nPXj", job, "-o", "ExitCode"), patience.SLURM)


SAVING = """
import time
from pathlib import Path
from vime.run.control import answer_checkpoint, checkpoint_requested
run = Path({run!r})
if (run / "saved").exists():
    print("goes on", flush=True)
    raise SystemExit
print("training", flush=True)
while not checkpoint_requested(run):
    time.sleep(0.1)
(run / "saved").touch()
answer_checkpoint(run, 3, "iter_3")
"""


def test_a_signal_sent_by_hand_reaches_the_controller(four_nodes: DevCluster, run_dir: Path) -> None:
    """The batch process is the controller itself: a shell in its place would die of the signal."""
    job = start(run_dir, stub("train", SAVING.format(run=str(run_dir))), nodes=1)
    wait_for_event(run_dir, "stage-start", patience.JOB, stage="train")
    slurm.call("scancel", "--batch", "-s", "USR2", job)
    assert wait_for_event(run_dir, "run-end", patience.NOTICE).data["cause"] == "PREEMPTED"
    assert wait_for_end(job, patience.JOB) == "COMPLETED"
    assert [event.data["restart"] for event in read_events(run_dir) if event.kind == "run-start"] == [0, 1]


def test_scancel_while_ray_starts_leaves_nothing_running(four_nodes: DevCluster, run_dir: Path) -> None:
    job = start(run_dir, *ray_stages(run_dir, 4), stub("train", TRAINING))
    wait_for_event(run_dir, "stage-start", patience.JOB, stage="ray-workers")
    slurm.cancel(job)
    assert wait_for_end(job, patience.SLURM) == "CANCELLED"
    end = wait_for_event(run_dir, "run-end", patience.NOTICE)
    assert (end.stage, end.data["cause"]) == ("ray-workers", "CANCELLED")
    four_nodes.assert_nothing_is_left(job, run_dir)


def test_a_run_is_seen_followed_and_cancelled(
    four_nodes: DevCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = start(run_dir, service("ray-head"), stub("train", TRAINING, nodes=range(2)), nodes=2)
    wait_until(lambda: len(list((run_dir / "logs/train").glob("node*.log"))) == 2, patience.JOB)
    assert status.main(["--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["state"], seen["job"], seen["stage"]) == ("running", job, "train")
    assert seen["hosts"] == ["node01", "node02"]
    assert 0 < seen["seconds_left"] <= 60 * MINUTES
    assert "vime: train" in slurm.call("squeue", "-h", "-j", job, "-o", "%k")
    assert (run_dir / "logs" / "current.log").read_text().endswith("training\n")

    argv = [sys.executable, "-m", "vime.logs", "-f"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as follower:
        assert cancel.main([]) == 0
        said, _ = follower.communicate(timeout=patience.PROCESS)
    assert f"job {job} cancelled" in capsys.readouterr().out
    for text in ("train/node00 training", "train/node01 training", "controller run-end"):
        assert text in said
    assert status.main([]) == 0
    assert "failed" in capsys.readouterr().out
    assert logs.main(["--stage", "train", "--node", "1"]) == 0
    assert capsys.readouterr().out.count("training") == 1
    four_nodes.assert_nothing_is_left(job, run_dir)


def test_a_job_that_slurm_could_never_run_is_refused_before_anything_is_submitted(
    four_nodes: DevCluster, run_dir: Path
) -> None:
    plan = make_plan(run_dir, [preflight(run_dir, 17)], nodes=17, kind="slurm")
    with pytest.raises(Exception, match="Slurm would refuse the job"):
        check_accepted([sbatch_text(plan)])
    assert slurm.call("squeue", "-h", "-n", plan.run_name) == ""


def test_a_run_on_sixteen_nodes_takes_one_srun_a_stage(sixteen_nodes: DevCluster, run_dir: Path) -> None:
    ranks = "import os; print(os.uname().nodename, os.environ['RANK'], flush=True)"
    stages = (
        service("ray-head"),
        service("ray-workers", nodes=range(1, 16)),
        stub("convert", ranks, nodes=range(16), deadline_s=patience.JOB),
        stub("train", "print('done')"),
    )
    job = start(run_dir, *stages, nodes=16)
    assert wait_for_end(job, patience.JOB) == "COMPLETED", read_events(run_dir)[-1]
    assert [node.host for node in read_binding(run_dir).nodes] == [f"node{i:02d}" for i in range(1, 17)]
    said = [path.read_text().split()[2:] for path in sorted((run_dir / "logs" / "convert").glob("node*.log"))]
    assert said == [[f"node{rank + 1:02d}", str(rank)] for rank in range(16)]
    steps = slurm.call("sacct", "-nP", "-j", job, "-o", "JobID").split()
    assert len([step for step in steps if step.partition(".")[2].isdigit()]) == len(stages) + 1
    sixteen_nodes.assert_nothing_is_left(job, run_dir)
