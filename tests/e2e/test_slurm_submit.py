"""Submission to a real Slurm: chains of jobs, templates submitted by hand, and the code that a queued run runs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, preflight, service, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end, wait_for_event, wait_until
from vime import attach, cancel, logs, status
from vime.run.folder import read_plan
from vime.run.jobs import Job, read_jobs
from vime.run.journal import read_events
from vime.run.plan import Plan, Stage
from vime.run.registry import record_run
from vime.schedulers.batch_script import scripts
from vime.schedulers.submission import check_free, submit_jobs, write_scripts
from vime.slurm import queue as slurm
from vime.slurm.sbatch import check_accepted

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / 'it\'s a "run" & größe $HOME'


def plan_chain(run_dir: Path, *stages: Stage, nodes: int) -> Plan:
    return make_plan(run_dir, [preflight(run_dir, nodes), *stages], nodes=nodes, kind="slurm", shape="chain")


def start_chain(run_dir: Path, *stages: Stage, nodes: int) -> tuple[Job, ...]:
    plan = plan_chain(run_dir, *stages, nodes=nodes)
    record_run(run_dir)
    check_accepted([script.text for script in scripts(plan)])
    return submit_jobs(plan)


def nodes_of(job: Job) -> int:
    return int(slurm.call("sacct", "-nPXj", job.job_id, "-o", "NNodes").strip())


def test_a_chain_runs_a_job_a_stage_each_after_the_one_before(
    four_nodes: DevCluster, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = "import os; print(os.environ['RANK'], os.environ['WORLD_SIZE'], flush=True)"
    stages = (
        stub("convert", ranks, nodes=range(4)),
        service("ray-head"),
        service("ray-workers", nodes=(1,)),
        stub("train", "import time; time.sleep(8)"),
        stub("report", "print('the end')"),
    )
    jobs = start_chain(run_dir, *stages, nodes=4)
    assert [job.link for job in jobs] == ["convert", "train", "report"]
    with pytest.raises(Exception, match=f"belongs to job {jobs[0].job_id}"):
        check_free(run_dir)
    wait_for_event(run_dir, "stage-start", patience.JOB, stage="train")
    assert status.main(["--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["state"], seen["job"], seen["stage"]) == ("running", jobs[1].job_id, "train")
    assert [(job["link"], job["state"]) for job in seen["jobs"]] == [
        ("convert", "COMPLETED"), ("train", "RUNNING"), ("report", "PENDING")
    ]  # fmt: skip
    assert seen["jobs"][2]["reason"] == "Dependency"
    assert {stage["name"]: stage["state"] for stage in seen["stages"]}["convert"] == "done"
    assert [wait_for_end(job.job_id, patience.JOB) for job in jobs] == ["COMPLETED"] * 3
    assert [nodes_of(job) for job in jobs] == [4, 2, 1]
    said = [path.read_text().split()[2:] for path in sorted((run_dir / "logs" / "convert").glob("node*.log"))]
    assert said == [[str(rank), "4"] for rank in range(4)]
    events = read_events(run_dir)
    assert [event.text for event in events if event.kind == "job-end"] == [
        "convert is done, train follows", "train is done, report follows"
    ]  # fmt: skip
    assert (events[-1].kind, events[-1].data["cause"]) == ("run-end", "SUCCESS")
    for job in jobs:
        four_nodes.assert_nothing_is_left(job.job_id, run_dir)


def test_the_first_failure_of_a_chain_ends_the_jobs_that_wait(four_nodes: DevCluster, run_dir: Path) -> None:
    jobs = start_chain(
        run_dir, stub("convert", "raise SystemExit('shard 3 is cut')"), stub("train", "pass"), stub("report", "pass"),
        nodes=1,
    )  # fmt: skip
    assert [wait_for_end(job.job_id, patience.JOB) for job in jobs] == ["FAILED", "CANCELLED", "CANCELLED"]
    end = read_events(run_dir)[-1]
    assert (end.kind, end.stage) == ("run-end", "convert")
    assert "shard 3 is cut" in end.text
    assert not (run_dir / "logs" / "train").exists()


def test_a_job_of_a_chain_is_requeued_and_the_chain_goes_on(four_nodes: DevCluster, run_dir: Path) -> None:
    mark = run_dir / "was here"
    once = f"import pathlib, time; p = pathlib.Path({str(mark)!r}); p.exists() or (p.touch(), time.sleep(300))"
    jobs = start_chain(run_dir, stub("convert", once, deadline_s=patience.TRAINING), stub("train", "pass"), nodes=1)
    wait_until(mark.exists, patience.SLURM)
    slurm.call("scancel", "--batch", "-s", "USR2", jobs[0].job_id)
    assert [wait_for_end(job.job_id, patience.JOB) for job in jobs] == ["COMPLETED", "COMPLETED"]
    starts = [event.data for event in read_events(run_dir) if event.kind == "run-start"]
    assert [(data["link"], data["restart"]) for data in starts] == [("convert", 0), ("convert", 1), ("train", 0)]


def test_without_accounting_a_whole_chain_is_seen_and_cancelled(
    four_nodes: DevCluster, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bin").mkdir()
    sacct = tmp_path / "bin" / "sacct"
    sacct.write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    sacct.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sacct.parent}:{os.environ['PATH']}")
    jobs = start_chain(run_dir, stub("convert", "import time; time.sleep(300)"), stub("train", "pass"), nodes=1)
    wait_for_event(run_dir, "stage-start", patience.JOB, stage="convert")
    assert status.main([]) == 0
    assert ": running, job" in capsys.readouterr().out
    assert cancel.main([]) == 0
    assert f"job {jobs[0].job_id}, {jobs[1].job_id} cancelled" in capsys.readouterr().out
    assert [wait_for_end(job.job_id, patience.SLURM) for job in jobs] == ["CANCELLED", "CANCELLED"]
    assert not (run_dir / "logs" / "train").exists()
    assert status.main([]) == 0
    assert ": cancelled, job" in capsys.readouterr().out
    assert logs.main(["--stage", "controller"]) == 0
    assert "run-end convert convert was ended by SIGTERM: cancelled" in capsys.readouterr().out


def test_a_person_attaches_to_a_node_of_a_running_run(
    four_nodes: DevCluster, run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(
        run_dir, [preflight(run_dir, 2), stub("train", "import time; time.sleep(300)", nodes=(0, 1))], nodes=2,
        kind="slurm",
    )  # fmt: skip
    record_run(run_dir)
    (job,) = submit_jobs(plan)
    wait_for_event(run_dir, "stage-start", patience.JOB, stage="train")
    command = [sys.executable, "-m", "vime.attach", "--node", "1"]
    look = ["bash", "-c", "hostname; pwd; echo $SLURM_JOB_ID $VIME_RUN"]
    done = subprocess.run([*command, "--", *look], capture_output=True, text=True, timeout=patience.PROCESS)
    assert done.stdout.splitlines() == ["node02", str(run_dir), f"{job.job_id} {run_dir}"], done.stderr
    # A shell with a terminal: `script` gives it one, as a person's login does.
    shell = subprocess.run(
        ["script", "-qec", shlex.join(command), "/dev/null"], input="hostname; tty; exit 7\n", capture_output=True,
        text=True, timeout=patience.PROCESS,
    )  # fmt: skip
    assert "node02" in shell.stdout
    assert "/dev/pts/" in shell.stdout
    assert shell.returncode == 7
    assert attach.main(["--node", "2"]) == 2
    assert cancel.main([]) == 0
    assert attach.main([]) == 2
    said = capfd.readouterr().err
    assert "--node is 2: the job has nodes 0 to 1" in said
    assert "only a running run can be attached to" in said
    four_nodes.assert_nothing_is_left(job.job_id, run_dir)


def tree_of(folder: Path) -> Path:
    """A working tree of its own, that the test may edit."""
    for name in ("vime", "configs", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, folder / name)
    return folder


SUBMIT_HELD = """
import sys
from pathlib import Path
from tests.support.launch_stub import make_plan, preflight, stub
from vime.run import code as snapshot
from vime.schedulers.submission import submit
from vime.launch.prepare import start
run_dir = Path(sys.argv[1])
code = "import vime.version_of_test as v, my_plugin; print(v.VALUE, my_plugin.VALUE, flush=True)"
plan = make_plan(run_dir, [preflight(run_dir, 2), stub("train", code, nodes=(0, 1))], nodes=2, kind="slurm",
                 cluster={"extra_sbatch": {"hold": True}})
rollout = plan.recipe.rollout.model_copy(update={"rm_type": "my_plugin:reward"})
plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"rollout": rollout})})
plan = plan.model_copy(update={"code": snapshot.folder_of(run_dir, snapshot.look(plan.recipe))})
start(plan)
print(submit(plan))
"""


def test_edits_after_the_submission_do_not_change_a_queued_run(four_nodes: DevCluster, tmp_path: Path) -> None:
    tree, run_dir = tree_of(tmp_path / "a tree"), tmp_path / "run folder"
    (tree / "vime" / "version_of_test.py").write_text("VALUE = 'as submitted'\n")
    (tree / "my_plugin.py").write_text("VALUE = 'own reward'\n")
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT_HELD, str(run_dir)],
        env=env,
        cwd=tree,
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[-1]
    (tree / "vime" / "version_of_test.py").write_text("VALUE = 'edited'\n")
    (tree / "vime" / "launch" / "controller.py").write_text("raise SystemExit('edited')\n")
    (tree / "vime" / "node" / "task.py").write_text("raise SystemExit('edited')\n")
    (tree / "my_plugin.py").write_text("VALUE = 'edited'\n")
    slurm.call("scontrol", "release", job)
    assert wait_for_end(job, patience.JOB) == "COMPLETED", read_events(run_dir)[-1:]
    for node in range(2):
        assert (run_dir / f"logs/train/node0{node}.log").read_text().endswith("as submitted own reward\n")
    size = sum(path.stat().st_size for path in (run_dir / "code").rglob("*"))
    assert size < 5 * 10**6


FAKE_APPTAINER = """#!/bin/bash
# Stands for apptainer, which is not to be had here: notes what it is told, and runs the command without a container.
printf '%s\\n' "$*" >> "$(dirname "$0")/calls"
while [ "$1" != /images/vime.sif ]; do shift; done
shift
exec "$@"
"""


def test_a_written_script_that_is_submitted_by_hand_runs_its_stages_in_the_container(
    four_nodes: DevCluster, tmp_path: Path, run_dir: Path
) -> None:
    fake = tmp_path / "bin dir" / "apptainer"
    fake.parent.mkdir()
    fake.write_text(FAKE_APPTAINER)
    fake.chmod(0o755)
    container = {"runtime": "apptainer", "image": "/images/vime.sif", "python": sys.executable}
    cluster = {"container": container, "setup": f'export PATH="{fake.parent}:$PATH"'}
    hosts = stub("train", "import os; print(os.uname().nodename, flush=True)", nodes=(0, 1))
    plan = make_plan(run_dir, [preflight(run_dir, 2), hosts], nodes=2, kind="slurm", cluster=cluster)
    (script,) = write_scripts(plan)
    job = by_hand(tmp_path, "sbatch", "--parsable", str(script)).strip()
    assert wait_for_end(job, patience.JOB) == "COMPLETED", read_events(run_dir)[-1:]
    assert read_jobs(run_dir) == (Job(job),)
    calls = (fake.parent / "calls").read_text().splitlines()
    assert len(calls) == 4
    begin = f"exec --no-home --bind={run_dir}:{run_dir},/tmp:/tmp /images/vime.sif"
    assert all(call.startswith(begin) for call in calls)
    assert [(run_dir / f"logs/train/node0{node}.log").read_text().split()[-1] for node in range(2)] == [
        "node01", "node02"
    ]  # fmt: skip
    four_nodes.assert_nothing_is_left(job, run_dir)


def by_hand(tmp_path: Path, *words: str) -> str:
    """Output of a program in a folder of its own, with this environment's Python first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path}
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=patience.PROCESS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_template_of_one_job_plans_in_the_allocation(
    four_nodes: DevCluster, tmp_path: Path, base_dir: Path
) -> None:
    """Up to the cast, which refuses the checkpoint that is only a shell of one."""
    template = str(ROOT / "slurm" / "deepseek-r1.sbatch")
    more = ["--recipe", "tiny-deepseek-r1", "--base-dir", str(base_dir), "--", "--lr", "2e-6"]
    job = by_hand(tmp_path, "sbatch", "--parsable", "--nodes=2", "--time=10", template, *more).strip()
    state = wait_for_end(job, patience.JOB)
    log = (tmp_path / f"vime-{job}.log").read_text()
    run_dir = base_dir / "runs" / f"tiny-deepseek-r1-{job}"
    plan = read_plan(run_dir)
    assert (len(plan.nodes), plan.cluster.time_limit_minutes, plan.recipe.optimizer.lr) == (2, 10, 2e-6), log
    assert plan.code is not None
    assert Path(plan.code, "vime", "launch", "__main__.py").is_file()
    events = read_events(run_dir)
    assert [event.kind for event in events if event.stage == "preflight"] == ["stage-start", "preflight", "stage-end"]
    assert (events[-1].kind, state) == ("run-end", "FAILED"), log
    assert read_jobs(run_dir) == (Job(job),)
    assert status.main([f"tiny-deepseek-r1-{job}"]) == 0


def test_the_template_of_a_chain_runs_the_plan_of_its_run_folder(sixteen_nodes: DevCluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "a run"
    plan_chain(
        run_dir, stub("convert", "print('converted')"), service("ray-head"), stub("train", "print('trained')"),
        stub("report", "print('told')"), nodes=1,
    )  # fmt: skip
    template = str(ROOT / "slurm" / "deepseek-r1-chain.sbatch")
    said = by_hand(tmp_path, "bash", template, "--run-dir", str(run_dir))
    jobs = [word for word in said.replace(",", " ").split() if word.isdigit()]
    assert len(jobs) == 3
    assert [wait_for_end(job, patience.JOB) for job in jobs] == ["COMPLETED"] * 3
    assert [job.link for job in read_jobs(run_dir)] == ["convert", "train", "report"]
    assert read_events(run_dir)[-1].data["cause"] == "SUCCESS"
