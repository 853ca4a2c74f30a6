"""vime.sweep: every variant is planned before one is queued; the same command again submits what is missing."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, preflight, stub
from tests.support.recording_scheduler import submissions
from vime.planning.evaluation import job_cluster
from vime.planning.sweep import load_sweep
from vime.run.folder import read_plan
from vime.schedulers.batch_script import sbatch_text
from vime.schedulers.slurm import Slurm
from vime.sweep import main

FILE = """
name: rates
submit: --recipe tiny-qwen3 --nodes 1 --cluster {profile} --base-dir {base}
flags: --num-rollout 3
at-once: 2
grid:
  lr: [{rates}]
"""


@pytest.fixture
def file(tmp_path: Path, base_dir: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the sweep's file with these learning rates."""
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    profile = tmp_path / "recorder.yaml"
    profile.write_text("kind: tests.support.recording_scheduler:Recorder\ngpu-request: none\n")

    def write(*rates: str) -> str:
        path = tmp_path / "rates.yaml"
        path.write_text(FILE.format(profile=profile, base=base_dir, rates=", ".join(rates)))
        return str(path)

    return write


def test_a_dry_run_prints_every_variant_and_submits_nothing(file, base_dir, capsys):
    assert main([file("1e-6", "2e-6"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "--lr 1e-6" in said
    assert "--lr 2e-6" in said
    assert f"2 of 2 would be submitted, below {base_dir}/runs/rates" in said
    assert submissions() == []
    assert not (base_dir / "runs").exists()


def test_no_more_than_at_once_are_active_and_a_second_call_adds_what_is_new(file, base_dir, capsys):
    assert main([file("1e-6", "2e-6", "3e-6", "4e-6")]) == 0
    assert [(row["run"], row["after"]) for row in submissions()] == [
        ("rates-000", ""),
        ("rates-001", ""),
        ("rates-002", "100"),
        ("rates-003", "101"),
    ]
    plan = read_plan(base_dir / "runs" / "rates" / "rates-002")
    assert plan.recipe.optimizer.lr == 3e-6
    assert plan.recipe.rollout.num_rollout == 3
    assert "pending" in capsys.readouterr().out
    assert main([file("1e-6", "2e-6", "3e-6", "4e-6", "5e-6")]) == 0
    assert [(row["run"], row["after"]) for row in submissions()[4:]] == [("rates-004", "100 102")]


def test_a_variant_that_failed_is_submitted_again(file, base_dir):
    main([file("1e-6")])
    event = {"time": 1.0, "kind": "run-start", "text": "", "data": {"job": "100"}}
    end = {"time": 2.0, "kind": "run-end", "text": "no", "data": {"cause": "CODE_ERROR"}}
    journal = base_dir / "runs" / "rates" / "rates-000" / "events.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in (event, end)))
    main([file("1e-6")])
    assert [row["run"] for row in submissions()] == ["rates-000", "rates-000"]


def test_a_file_whose_old_variants_have_other_options_is_refused(file, capsys):
    main([file("1e-6", "2e-6")])
    capsys.readouterr()
    assert main([file("1e-6", "3e-6", "2e-6")]) == 2
    assert "variant 001 was submitted with --lr 2e-6 and is --lr 3e-6 now: add new variants" in capsys.readouterr().err
    assert main([file("1e-6", "2e-6", "3e-6")]) == 0
    assert [row["run"] for row in submissions()] == ["rates-000", "rates-001", "rates-002"]


def test_two_calls_do_not_submit_at_the_same_time(file, base_dir, capsys):
    path = file("1e-6", "2e-6")
    assert main([path]) == 0
    with (base_dir / "runs" / "rates" / ".sweep.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main([file("1e-6", "2e-6", "3e-6")]) == 2
    assert "another vime.sweep submits to" in capsys.readouterr().err
    assert len(submissions()) == 2
    assert main([path]) == 0
    assert [row["run"] for row in submissions()] == ["rates-000", "rates-001", "rates-002"]


def test_jobs_that_the_scheduler_cannot_order_are_refused_before_any_is_submitted(file, tmp_path, capsys):
    path = file("1e-6", "2e-6", "3e-6")
    profile = tmp_path / "recorder.yaml"
    profile.write_text(profile.read_text().replace(":Recorder", ":Unordered"))
    assert main([path]) == 2
    assert "variant 000 (--lr 1e-6): the recorder cannot order jobs" in capsys.readouterr().err
    assert submissions() == []
    assert main([file("1e-6", "2e-6")]) == 0


def test_one_wrong_variant_is_named_and_none_is_submitted(file, base_dir, capsys):
    assert main([file("1e-6", "2.0")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: variant 001 (--lr 2.0): ")
    assert len(said.splitlines()) == 1
    assert submissions() == []
    assert not (base_dir / "runs").exists()


def test_variants_are_compared_on_one_page(file, base_dir, capsys):
    path = file("1e-6", "2e-6")
    assert main([path, "--report"]) == 2
    main([path])
    capsys.readouterr()
    assert main([path, "--report"]) == 0
    page = base_dir / "runs" / "rates" / "compare.html"
    assert capsys.readouterr().out == f"2 runs compared: {page}\n"
    assert "<td>lr</td><td>1e-06</td><td>2e-06</td>" in page.read_text()
    assert main([path, "--status"]) == 0
    assert capsys.readouterr().out.count("pending") == 2


def test_what_the_sweep_decides_is_refused(file, tmp_path, capsys):
    path = Path(file("1e-6"))
    path.write_text(path.read_text().replace("--nodes 1", "--nodes 1 --run-dir x"))
    assert main([str(path)]) == 2
    assert "--run-dir is decided by the sweep" in capsys.readouterr().err


def test_slurm_orders_jobs_by_their_dependency(tmp_path):
    plan = make_plan(tmp_path, [preflight(tmp_path, 2), stub("train", "")], nodes=2, kind="slurm")
    assert "#SBATCH --dependency=afterany:4711:4713" in sbatch_text(Slurm().after(plan, ("4711", "4713")))
    assert Slurm().after(plan, ()) == plan


def test_the_evaluations_of_a_run_do_not_wait_for_what_it_waited_for(tmp_path):
    plan = make_plan(tmp_path, [preflight(tmp_path, 2)], nodes=2, kind="slurm", cluster={"extra_sbatch": {"nice": 10}})
    assert job_cluster(Slurm().after(plan, ("4711",)).cluster).extra_sbatch == {"nice": 10}


def test_the_example_of_the_docs_is_a_sweep():
    assert len(load_sweep("configs/sweeps/example.yaml").variants) == 6
