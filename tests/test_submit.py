"""vime.submit and vime.plan as a person calls them on a login node: quick, light, and clear about bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, stub
from vime import submit
from vime.launch.prepare import start
from vime.run.folder import read_plan
from vime.run.registry import last_run

HEAVY = ("torch", "ray", "vllm", "transformers", "numpy", "megatron", "submitit", "asyncio")


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a machine without Slurm's commands, and of a person without settings."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("BASE_DIR", raising=False)
    return dict(os.environ)


def python(*words: str, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=patience.PROCESS,
        check=False,
    )


@pytest.mark.parametrize("module", ["vime.submit", "vime.plan"])
def test_importing_a_command_loads_nothing_heavy(module: str):
    code = f"import {module}, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert python("-c", code, env=dict(os.environ)).stdout.strip() == "[]"


def test_the_dry_run_of_full_r1_needs_no_slurm_no_torch_and_no_checkpoint(no_slurm: dict[str, str], tmp_path: Path):
    code = (
        "import sys; from vime.submit import main; code = main(['--nodes', '16', '--dry-run']);"
        f"print([name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    result = python("-c", code, env=no_slurm, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    for text in ("128 ranks, TP8 x CP4 x DP1 x PP4", "DP8 x TP8, expert parallel", "node 4-11: 1.13 TB", "#SBATCH"):
        assert text in result.stdout
    assert "srun --job-name=vime-ray-workers --nodes=15 --nodelist=NODES" in result.stdout
    assert "planned without the scheduler: there is no Slurm on this machine" in result.stdout
    assert not (tmp_path / "state").exists()


def test_the_dry_run_computes_for_less_than_a_second(no_slurm: dict[str, str]):
    """Its time by the clock, which others on the machine lengthen, is tools/bench/dry_run.py's."""
    busy = []
    for _ in range(3):
        before = os.times()
        python("-m", "vime.submit", "--nodes", "16", "--dry-run", env=no_slurm)
        after = os.times()
        busy.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(busy) < 1.0


def test_a_dry_run_writes_the_plan_only_where_it_is_told_to(no_slurm: dict[str, str], tmp_path: Path):
    run_dir = tmp_path / "the run"
    assert submit.main(["--dry-run", "--base-dir", str(tmp_path)]) == 0
    assert not (tmp_path / "runs").exists()
    assert submit.main(["--dry-run", "--base-dir", str(tmp_path), "--run-dir", str(run_dir), "--", "--lr", "2e-6"]) == 0
    assert read_plan(run_dir).recipe.optimizer.lr == 2e-6
    assert (run_dir / "submit" / "run.sbatch").read_text().splitlines()[-1].endswith(f"--run-dir '{run_dir}'")
    assert Path(read_plan(run_dir).code or "", "vime", "submit.py").is_file()


def test_a_plan_is_printed_for_people_and_for_programs(no_slurm: dict[str, str]):
    shown = python("-m", "vime.plan", "--json", env=no_slurm).stdout
    plan = json.loads(shown)
    node = plan["nodes"][5]
    assert node["ranks"] == list(range(40, 48))
    assert node["host_memory"]["total_bytes"] == sum(item["bytes"] for item in node["host_memory"]["items"])
    assert {"name", "bytes", "why"} == set(node["host_memory"]["items"][0])
    placement = python("-m", "vime.plan", "--placement", env=no_slurm).stdout.splitlines()
    assert len(placement) == 1 + 128
    # Node 15, GPU 7: the last rank of every dimension, served by engine 1, data-parallel rank 7, tensor rank 7.
    assert placement[-1].split() == ["15", "7", "127", "7", "3", "0", "3", "31", "0", "0", "1", "7", "7"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "tiny-qwen3"], "there is no Slurm on this machine: submit from a login node, or run here with"),
        (["--lr", "3"], "unrecognized arguments: --lr: options of the recipe follow --"),
        (["--bogus"], "unrecognized arguments: --bogus: see python -m vime.submit --help"),
        (["stray"], "unexpected argument 'stray': options of the recipe follow --"),
        (["--nodes", "0", "--dry-run"], "--nodes is 0: give at least 1"),
        (["--nodes", "many"], "argument --nodes: 'many' is neither a number nor auto"),
        (["--nodes", "2", "--dry-run"], "16 ranks cannot hold TP8 x CP4 x PP4 = 128"),
        (["--nodes", "8", "--dry-run", "--", "--actor-num-nodes", "16"], "--nodes 8 and --actor-num-nodes 16 differ"),
        (
            ["--cluster", "mars", "--dry-run"],
            "unknown cluster 'mars': give a path or one of devcluster, example, local",
        ),
        (["--dry-run", "--", "--lrr", "3"], "unknown option --lrr: did you mean --lr?"),
        (["--time", "soon", "--dry-run"], "--time is 'soon'"),
        (["--cluster", "local", "--recipe", "tiny-qwen3"], "$BASE_DIR is not set, and --hf-checkpoint needs it"),
        (["--cluster", "local", "--spares", "1"], "have no meaning with --cluster local"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, no_slurm: dict[str, str], capsys: pytest.CaptureFixture[str]
):
    assert submit.main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_local_run_has_one_node(base_dir: Path, no_slurm: dict[str, str], capsys: pytest.CaptureFixture[str]):
    words = ["--cluster", "local", "--recipe", "tiny-deepseek-r1", "--base-dir", str(base_dir), "--nodes", "2"]
    assert submit.main(words) == 2
    assert (
        "--nodes is 2, but with --cluster local this machine is the only node: give --nodes 1"
        in capsys.readouterr().err
    )
    assert not list(base_dir.rglob("plan.json"))


def test_bad_input_leaves_nothing_behind(no_slurm: dict[str, str], tmp_path: Path):
    base = tmp_path / "base"
    base.mkdir()
    words = [
        "--recipe",
        "tiny-qwen3",
        "--cluster",
        "local",
        "--base-dir",
        str(base),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert submit.main(words) == 2
    assert list(base.iterdir()) == []
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "state").exists()


def fake_sinfo(folder: Path, line: str) -> None:
    """Stands for Slurm's commands where only their answer matters."""
    folder.mkdir()
    for name in ("sinfo", "sbatch"):
        (folder / name).write_text(f"#!{shutil.which('sh', path='/bin:/usr/bin')}\necho '{line}'\n")
        (folder / name).chmod(0o755)


def test_more_nodes_than_the_partition_has_are_refused_before_anything_is_written(
    no_slurm: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake_sinfo(tmp_path / "bin", "gpu|gpu*|up|4|64|1600000|gpu:8|7-00:00:00")
    words = ["--recipe", "tiny-qwen3", "--nodes", "4", "--spares", "1", "--run-dir", str(tmp_path / "run")]
    assert submit.main([*words, "--base-dir", str(tmp_path)]) == 2
    assert "the run needs 5 nodes, but partition gpu has 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_the_nodes_cannot_hold_is_refused_before_anything_is_written(
    no_slurm: dict[str, str], tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
):
    fake_sinfo(tmp_path / "bin", "gpu|gpu*|up|16|64|3000|gpu:8|7-00:00:00")
    before = sorted(base_dir.rglob("*"))
    assert submit.main(["--recipe", "tiny-deepseek-r1", "--base-dir", str(base_dir)]) == 2
    assert "node 0 needs 4 GB of host memory and has 3 GB: python -m vime.plan" in capsys.readouterr().err
    assert sorted(base_dir.rglob("*")) == before


def test_auto_takes_the_fewest_nodes_that_fit(no_slurm: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert submit.main(["--nodes", "auto", "--node-memory", "1000", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "--nodes auto: 32 nodes" in printed
    assert "nodes       32 of 8 GPUs" in printed
    assert submit.main(["--nodes", "auto", "--node-memory", "30", "--dry-run"]) == 2
    assert "--nodes auto: nothing up to 256 nodes of 30 GB fits" in capsys.readouterr().err
    assert submit.main(["--nodes", "auto", "--dry-run"]) == 2
    assert "host memory of a node of cluster slurm is not known" in capsys.readouterr().err


def test_a_job_that_slurm_refuses_leaves_nothing_behind(
    no_slurm: dict[str, str], tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
):
    fake_sinfo(tmp_path / "bin", "gpu|gpu*|up|16|64|1600000|gpu:8|2-00:00:00")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    before = sorted(base_dir.rglob("*"))
    assert submit.main(["--recipe", "tiny-deepseek-r1", "--base-dir", str(base_dir)]) == 2
    assert "Slurm would refuse the job: sbatch: error: Invalid account" in capsys.readouterr().err
    assert sorted(base_dir.rglob("*")) == before


def test_a_dry_run_says_what_was_found_and_what_would_be_refused(
    no_slurm: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake_sinfo(tmp_path / "bin", "gpu|gpu*|up|16|64|1600000|gpu:8|2-00:00:00")
    assert submit.main(["--dry-run"]) == 0
    assert "partition gpu chosen: 16 nodes of 64 CPUs, 8 GPUs" in capsys.readouterr().out
    assert submit.main(["--dry-run", "--spares", "1"]) == 0
    assert "would be refused: --nodes: the run needs 17 nodes, but partition gpu has 16" in capsys.readouterr().out
    assert submit.main(["--dry-run", "--time", "3-00"]) == 2
    assert "the longest that partition gpu gives" in capsys.readouterr().err


def test_every_option_is_listed_with_its_value(no_slurm: dict[str, str], capsys: pytest.CaptureFixture[str]):
    assert submit.main(["--recipe", "tiny-qwen3", "--list-options", "--", "--lr", "3"]) == 0
    listed = capsys.readouterr().out
    assert "--lr 3.0" in listed
    assert "--vllm-server-concurrency 64   # Requests in flight per server." in listed


def test_a_local_run_is_recorded_before_it_starts(
    no_slurm: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_dir: Path
):
    local = pytest.importorskip("vime.schedulers.local")
    started = []
    monkeypatch.setattr(local, "run", lambda plan: started.append(last_run()) or 7)
    words = ["--recipe", "tiny-deepseek-r1", "--cluster", "local", "--base-dir", str(base_dir), "--run-name", "a b"]
    assert submit.main(words) == 7
    assert started == [base_dir / "runs" / "a b"]
    assert read_plan(started[0]).run_name == "a b"


def test_a_run_folder_goes_on_with_its_own_recipe_only(
    no_slurm: dict[str, str], tmp_path: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["--base-dir", str(base_dir), "--run-dir", str(tmp_path / "run"), "--cluster", "local"]
    for lr in ("1", "2"):
        plan = submit.main(["--recipe", "tiny-deepseek-r1", *words, "--dry-run", "--", "--lr", lr])
        assert plan == 0
    assert read_plan(tmp_path / "run").recipe.optimizer.lr == 2
    assert submit.main(["--recipe", "tiny-qwen3", *words]) == 2
    assert "holds a run of the recipe tiny-deepseek-r1" in capsys.readouterr().err
    assert read_plan(tmp_path / "run").recipe.name == "tiny-deepseek-r1"


def test_a_folder_too_long_for_sockets_is_refused_at_once(
    no_slurm: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Ray would fail hours later, after the conversion, with "AF_UNIX path length cannot exceed 107 bytes"."""
    profile = tmp_path / "site.yaml"
    profile.write_text(f"kind: slurm\nenv: {{VIME_NODE_TMP: /scratch/{'project-' * 6}}}\n")
    assert submit.main(["--dry-run", "--cluster", str(profile)]) == 2
    assert "VIME_NODE_TMP is /scratch/project-" in capsys.readouterr().err


def test_a_registry_that_cannot_be_written_costs_a_note(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On compute nodes the home folder may be read-only, or full."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    plan = make_plan(run_dir, [stub("train", "")])
    start(plan)
    assert "note: the run is not in the list of runs, so give its folder to vime.status" in capsys.readouterr().out
