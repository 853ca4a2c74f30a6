"""A run with secrets in its recipe, profile and errors: none of them stands in anything that is shown or shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch_stub import make_plan, stub
from vime.cli import command
from vime.errors import BadInput
from vime.launch.prepare import start
from vime.node.task import TaskRank, task_env
from vime.planning.build import Checks
from vime.planning.build import make_plan as build_plan
from vime.planning.cluster import load_cluster
from vime.planning.needs import as_json, needs_of
from vime.planning.show import render
from vime.recipe.load import load_recipe
from vime.report import write_report
from vime.run.environment import export_lines, resolve
from vime.run.folder import read_plan, write_plan
from vime.run.journal import Journal, read_events
from vime.run.plan import Plan
from vime.schedulers.batch_script import sbatch_text, step_calls
from vime.schedulers.submission import write_scripts
from vime.system.redact import redacted

SECRET = "hunter2hunter2"
URL = f"https://user:{SECRET}@reward.example/score"


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    cluster = {"env": {"WANDB_API_KEY": SECRET, "http_proxy": f"http://me:{SECRET}@proxy:80", "NCCL_DEBUG": "WARN"}}
    plan = make_plan(tmp_path / "run", [stub("train", "")], kind="slurm", cluster=cluster, notes=(f"asks {URL}",))
    misc = plan.recipe.misc.model_copy(update={"env": {"HF_TOKEN": SECRET}})
    rollout = plan.recipe.rollout.model_copy(update={"rm_url": URL})
    recipe = plan.recipe.model_copy(update={"misc": misc, "rollout": rollout})
    words = ("--recipe", "stub", "--", "--rm-url", URL)
    plan = plan.model_copy(update={"recipe": recipe, "command": words, "code": None})
    write_plan(plan)
    return plan


def test_plan_and_batch_script_show_none(plan: Plan) -> None:
    scripts = [sbatch_text(plan), *step_calls(plan), *(path.read_text() for path in write_scripts(plan))]
    assert "export NCCL_DEBUG=WARN" in scripts[0]
    recipe = load_recipe("deepseek-r1", ["--rm-url", URL])
    cluster = load_cluster("example").model_copy(update={"env": plan.cluster.env})
    checks, place = Checks(inputs=False, run_folder=False), Path(plan.run_dir)
    large = build_plan(recipe, cluster=cluster, nodes=16, base_dir=place, run_dir=place, run_name="r", checks=checks)
    large = large.model_copy(update={"notes": plan.notes})
    shown = [render(large), json.dumps(as_json(large, needs_of(large)))]
    assert not [text for text in (*scripts, *shown) if SECRET in text]
    assert "https://***@reward.example" in shown[0]


def test_journal_report_and_weights_and_biases_get_none(plan: Plan) -> None:
    run = Path(plan.run_dir)
    journal = Journal(run)
    journal.write("run-start", data={"job": "7"})
    tail = [f"requests.exceptions.ConnectionError: {URL}", f"HF_TOKEN={SECRET}"]
    journal.write("run-end", f"train failed: no answer of {URL}", data={"cause": "CODE_ERROR", "log_tail": tail})
    journal.close()
    write_report(run)
    for path in run.rglob("*"):
        if path.is_file() and path.name not in ("plan.json", ".reserve"):
            assert SECRET not in path.read_text(errors="replace"), path
    assert "https://***@reward.example/score" in read_events(run)[-1].text
    assert SECRET not in json.dumps(redacted(plan.recipe.model_dump(mode="json")))


def test_errors_show_none(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: Any) -> int:
        raise BadInput(f"--rm-url {URL}: no answer")

    assert main([]) == 2
    assert capsys.readouterr().err == "error: --rm-url https://***@reward.example/score: no answer\n"


def test_the_tasks_get_them_all(plan: Plan) -> None:
    stage = stub("train", "").model_copy(update={"env": plan.recipe.misc.env})
    env = task_env(read_plan(plan.run_dir), stage, TaskRank(0, 0, 1, 0, 1, 0), None, {})
    assert (env["WANDB_API_KEY"], env["HF_TOKEN"]) == (SECRET, SECRET)


def test_a_variable_or_a_private_file_gives_a_secret_that_no_plan_holds(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    file.chmod(0o600)
    given = {"WANDB_API_KEY": "variable:MY_KEY", "HF_TOKEN": f"file:{file}", "A": "b"}
    assert resolve(given, {"MY_KEY": "k"}) == {"WANDB_API_KEY": "k", "HF_TOKEN": SECRET, "A": "b"}
    assert export_lines(given) == ['export WANDB_API_KEY="${MY_KEY}"', f'export HF_TOKEN="$(cat {file})"', "export A=b"]
    file.chmod(0o640)
    with pytest.raises(BadInput, match=r"can be read by others \(mode 640\): chmod 600"):
        resolve(given, {"MY_KEY": "k"})
    with pytest.raises(BadInput, match="MY_KEY is not set: export MY_KEY before you submit"):
        resolve(given, {})
    with pytest.raises(BadInput, match="cannot read it: No such file"):
        resolve({"A": f"file:{tmp_path / 'none'}"}, {})


def test_a_missing_reference_is_refused_before_a_run_is_recorded(plan: Plan, tmp_path: Path) -> None:
    cluster = plan.cluster.model_copy(update={"env": {"KEY": "variable:VIME_TEST_NOT_SET"}})
    with pytest.raises(BadInput, match="VIME_TEST_NOT_SET is not set"):
        start(plan.model_copy(update={"cluster": cluster, "run_dir": str(tmp_path / "other")}))
    assert not (tmp_path / "other").exists()
