"""vime.launch in the environment of a Slurm job: what it takes from the job, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, preflight, stub
from vime.launch import __main__ as batch
from vime.run.folder import read_plan, write_plan
from vime.run.jobs import Job, add_job, read_jobs, write_jobs
from vime.run.registry import last_run
from vime.slurm import queue as slurm


@pytest.fixture
def in_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """A job of 2 nodes in a cluster without Slurm's commands; what would replace this process is recorded."""
    replaced: list[tuple[str, dict[str, str]]] = []
    for name, value in {
        "PATH": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), "SLURM_JOB_ID": "41",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "gpu", "SLURM_SUBMIT_DIR": "/home/me",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(slurm, "job_state", lambda job: slurm.JobState(job, "RUNNING", time_limit_minutes=90))

    def replace(path: str, argv: list[str], env: dict[str, str]) -> None:
        replaced.append((" ".join(argv[1:]), env))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", replace)
    return replaced


def test_outside_a_job_it_says_how_to_submit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert batch.main([]) == 2
    assert "vime.launch runs inside a job" in capsys.readouterr().err


def test_a_plan_in_the_run_folder_is_taken_and_its_code_is_run(in_job, run_dir: Path) -> None:
    plan = make_plan(run_dir, [preflight(run_dir, 2), stub("train", "")], nodes=2, kind="slurm")
    write_plan(plan.model_copy(update={"code": "/shared/code/1"}))
    with pytest.raises(SystemExit):
        batch.main(["--run-dir", str(run_dir)])
    ((command, env),) = in_job
    assert command == f"-u -m vime.launch --run-dir {run_dir}"
    assert (env["PYTHONPATH"], env["PYTHONSAFEPATH"]) == ("/shared/code/1:/home/me", "1")


def test_an_allocation_that_is_too_small_is_refused(in_job, run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(run_dir, [preflight(run_dir, 2), stub("train", "")], nodes=2, kind="slurm", spares=1)
    assert batch.main(["--run-dir", str(run_dir)]) == 2
    assert "the job has 2 nodes, but the plan takes 3: submit with --nodes 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "train"], "the run is one job"),
        (["--cluster", "local"], "--cluster local has no meaning in a job"),
    ],
)
def test_options_without_sense_in_a_job_are_refused(
    in_job, run_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(run_dir, [stub("train", "")], kind="slurm")
    assert batch.main(["--run-dir", str(run_dir), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_plan_the_job_says_how_large_the_run_is(
    in_job, tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sinfo", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'gpu|gpu*|up|16|64|1600000|gpu:8|2-00:00:00'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(SystemExit):
        batch.main(["--recipe", "tiny-deepseek-r1", "--base-dir", str(base_dir), "--spares", "1", "--", "--lr", "3"])
    plan = read_plan(base_dir / "runs" / "tiny-deepseek-r1-41")
    assert (len(plan.nodes), plan.spares, plan.cluster.partition, plan.recipe.optimizer.lr) == (1, 1, "gpu", 3)
    assert plan.cluster.time_limit_minutes == 90
    assert plan.code is not None
    assert Path(plan.code, "vime", "launch", "__main__.py").is_file()
    assert last_run() == Path(plan.run_dir)


def test_jobs_tell_of_themselves_once(tmp_path: Path) -> None:
    assert read_jobs(tmp_path) == ()
    for job in (Job("1", "cast"), Job("2", "train"), Job("2", "train"), Job("3", "train")):
        add_job(tmp_path, job)
    assert read_jobs(tmp_path) == (Job("1", "cast"), Job("3", "train"))
    write_jobs(tmp_path, [Job("4")])
    add_job(tmp_path, Job("5"))
    assert read_jobs(tmp_path) == (Job("5"),)
