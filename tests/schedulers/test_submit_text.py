"""The texts that Slurm gets, held against golden files: the batch script and the srun call of a stage.

`UPDATE_GOLDEN=1 pytest …` writes the files anew; look at their difference before you commit them.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch_stub import make_plan, preflight, service, stub
from tests.support.plans import plan_of as run_of
from vime.errors import BadInput, Cause
from vime.planning.evaluation import Subject, evaluation_plan, job_cluster
from vime.run.chain import Link, links
from vime.run.jobs import Job, read_jobs
from vime.run.plan import Cluster, Evaluation, Plan
from vime.schedulers.batch_script import (
    module_lines,
    sbatch_options,
    sbatch_text,
    scripts,
    setup_lines,
    submit_folder,
)
from vime.schedulers.container import environment, srun_options, wrap
from vime.schedulers.runner_slurm import cause_of_message, site_comment, with_comment
from vime.schedulers.srun import attach_argv, srun_argv, step_python
from vime.schedulers.submission import check_container, check_path, submit_jobs, write_scripts
from vime.slurm.client import step_environment
from vime.slurm.queue import cpus_per_node, parse_job

GOLDEN = Path(__file__).parent / "golden"
PYTHON = "/shared/envs/vime 2/bin/python"


def plan_of(tmp_path: Path, run_dir: str = "/shared/runs/first", nodes: int = 2, **cluster: Any) -> Plan:
    stages = [preflight(tmp_path, nodes), stub("convert", "", nodes=range(nodes), tasks_per_node=4, cpus_per_task=2)]
    settings = {"python": PYTHON, "time_limit_minutes": 10, **cluster}
    plan = make_plan(tmp_path, stages, nodes=nodes, kind="slurm", cluster=settings, spares=1)
    return plan.model_copy(update={"run_dir": run_dir, "run_name": "first"})


def check_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


PROFILES: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole-nodes": {
        "exclusive": True, "mem": "0", "gpus_per_node": 8, "gpu_request": "gpus-per-node", "partition": "gpu",
        "account": "project", "qos": "high", "constraint": "h100", "time_limit_minutes": 2880,
    },
    "gres-and-setup": {
        "gpus_per_node": 4, "gpu_request": "gres", "cpus_per_node": 48, "mem": "200GB",
        "setup": ("module load cuda", "source /shared/envs/vime/bin/activate"), "env": {"NAME": "it's $HOME"},
        "extra_sbatch": {"reservation": "big", "no-kill": True},
    },
    "modules-and-venv": {
        "modules": ("cuda/12.9", "gcc"), "venv": "/shared/envs/vime 3", "python": None, "setup": "ulimit -l unlimited",
        "gpus_per_node": 8, "gpu_request": "gpus-per-node", "gpu_type": "h100", "network_interface": "ib0",
    },
}  # fmt: skip


def chain_of(tmp_path: Path) -> Plan:
    """Three jobs: 4 tasks a node on 2 nodes; Ray and training with GPUs; the report."""
    plan = plan_of(tmp_path, gpus_per_node=8, gpu_request="gpus-per-node", exclusive=True, mem="0")
    stages = (
        *plan.stages,
        service("ray-head", gpus_per_node=8),
        stub("train", "", deadline_s=10**6),
        stub("report", ""),
    )
    # The jobs' time limits follow from these, whatever machine the tests run on.
    stages = [one if one.name == "train" else one.model_copy(update={"deadline_s": 60.0}) for one in stages]
    return plan.model_copy(
        update={"shape": "chain", "stages": tuple(stages), "code": "/shared/runs/first/code/0123456789ab"}
    )


def test_the_batch_scripts_of_a_chain(tmp_path: Path) -> None:
    plan = chain_of(tmp_path)
    ids = (None, "7", "8")
    for link, after in zip(links(plan), ids, strict=True):
        check_golden(f"chain-{link.index + 1}-{link.name}.sbatch", sbatch_text(plan, link, after))


def test_the_batch_script_of_an_evaluation_has_a_shape_of_its_own() -> None:
    run = run_of("deepseek-r1", "--eval-prompt-data", "aime", "/data/aime.jsonl", nodes=16)
    shape = {"nodes": 2, "partition": "small", "qos": "short"}
    profile = Cluster(
        name="site", kind="slurm", partition="big", python=PYTHON, account="project", gpus_per_node=8, eval_job=shape
    )
    weights = "/shared/run/evaluations/0000012/weights"
    evaluation = Evaluation(weights=weights, run_dir=run.run_dir, rollout_id=12)
    folder = "/shared/run/evaluations/0000012"
    subject = Subject(evaluation, "first-eval-12", folder, run.model_config_hf)
    plan = evaluation_plan(run.recipe, job_cluster(profile).model_copy(update={"gpus_per_node": 8}), None, subject)
    check_golden("evaluation.sbatch", sbatch_text(plan))


def test_the_scripts_that_slurm_is_asked_about_name_no_job_that_is_to_be(tmp_path: Path) -> None:
    told = scripts(chain_of(tmp_path))
    assert [script.link for script in told] == ["convert", "train", "report"]
    assert not any("dependency" in script.text for script in told)


def test_a_script_that_is_written_can_be_submitted_by_hand(tmp_path: Path) -> None:
    plan = chain_of(tmp_path).model_copy(update={"run_dir": str(tmp_path / "it's a run")})
    paths = write_scripts(plan)
    assert [path.name for path in paths] == ["convert.sbatch", "train.sbatch", "report.sbatch"]
    for path, script in zip(paths, scripts(plan), strict=True):
        *head, _, command = path.read_text().splitlines()
        assert head == script.text.splitlines()[: len(head)]
        words = shlex.split(command)
        assert words[:2] == ["exec", PYTHON]
        assert words[2:] == ["-u", "-m", "vime.launch", "--run-dir", plan.run_dir, "--stage", script.link]


def test_a_submission_that_fails_in_the_middle_leaves_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, cancelled = chain_of(tmp_path).model_copy(update={"run_dir": str(tmp_path)}), []

    def submit_one(plan: Plan, link: Link, after: str | None) -> Job:
        if link.name == "report":
            raise BadInput("sbatch refused the job: QOSMaxSubmitJobPerUserLimit")
        return Job(str(7 + link.index), link.name)

    monkeypatch.setattr("vime.schedulers.submission._submit_one", submit_one)
    monkeypatch.setattr("vime.slurm.queue.cancel", cancelled.append)
    with pytest.raises(BadInput, match="QOSMaxSubmit"):
        submit_jobs(plan)
    assert cancelled == ["7", "8"]
    assert read_jobs(tmp_path) == ()


@pytest.mark.usefixtures("interruptible")
def test_a_submission_that_is_interrupted_has_recorded_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = chain_of(tmp_path).model_copy(update={"run_dir": str(tmp_path)})

    def submit_one(plan: Plan, link: Link, after: str | None) -> Job:
        os.kill(os.getpid(), signal.SIGINT)
        return Job(str(7 + link.index), link.name)

    monkeypatch.setattr("vime.schedulers.submission._submit_one", submit_one)
    with pytest.raises(KeyboardInterrupt):
        submit_jobs(plan)
    assert [job.job_id for job in read_jobs(tmp_path)] == ["7", "8", "9"]


@pytest.mark.parametrize("name", PROFILES)
def test_the_batch_script_of_a_profile(tmp_path: Path, name: str) -> None:
    check_golden(f"{name}.sbatch", sbatch_text(plan_of(tmp_path, **PROFILES[name])))


def test_the_batch_script_of_a_hostile_path(tmp_path: Path) -> None:
    text = sbatch_text(plan_of(tmp_path, run_dir='/shared/it\'s a "run" & größe $HOME'))
    check_golden("hostile-path.sbatch", text)
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    command = next(line for line in text.splitlines() if line.startswith("exec"))
    assert shlex.split(command)[-1] == '/shared/it\'s a "run" & größe $HOME/submit'


def test_the_batch_process_becomes_python_and_gets_the_signal_itself(tmp_path: Path) -> None:
    text = sbatch_text(plan_of(tmp_path))
    assert "#SBATCH --signal=B:USR2@300" in text
    assert text.splitlines()[-1].startswith("exec ")
    assert "srun" not in text


MODULES = {
    "loaded": ("module() { echo loading $2; }", 0),
    "no such command": ("", 2),
    "no such module": ("module() { echo 'Lmod has detected the following error' >&2; return 1; }", 2),
    "no such module, with an old program": ('module() { echo "ERROR:105: Unable to locate a modulefile" >&2; }', 2),
    "a note": ("module() { echo 'cuda is deprecated' >&2; }", 0),
}
"""The function `module` of sites, and the exit code of a script that needs a module."""


@pytest.mark.parametrize("site", MODULES)
def test_a_module_that_is_missing_ends_the_job_with_its_name(site: str) -> None:
    function, code = MODULES[site]
    script = "\n".join([function, *module_lines(["cuda/12.9"]), "echo started"])
    done = subprocess.run(["bash", "-c", script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == code
    assert ("started" in done.stdout) == (code == 0)
    assert ("error: the modules cuda/12.9 of the cluster profile cannot be loaded" in done.stderr) == (code == 2)


def test_no_slurm_and_no_torch_are_needed_for_the_text(tmp_path: Path) -> None:
    plan_of(tmp_path)
    code = (
        "import sys; from vime.schedulers.batch_script import sbatch_text; from vime.run.folder import read_plan;"
        "heavy = {'torch', 'ray', 'numpy', 'vllm', 'submitit'}; print(sbatch_text(read_plan(sys.argv[1])));"
        "heavy &= sys.modules.keys();"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=3" in done.stdout


@pytest.mark.parametrize("path", ["/shared/100%", "/shared/a\nb", "/shared/a\\b", "/shared/a:b"])
def test_paths_that_sbatch_would_change_are_refused(path: str) -> None:
    with pytest.raises(BadInput, match="--run-dir"):
        check_path(path)


def test_the_srun_call_states_cpus_and_shares_nodes(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, gpus_per_node=8)
    stage = plan.stages[1]
    plan = plan.model_copy(update={"run_dir": "/shared/a run"})
    argv = srun_argv(stage, ["node01", "node04"], plan=plan, python=PYTHON, cpus_per_node=64)
    check_golden("convert.srun", "\n".join(argv) + "\n")


@pytest.mark.parametrize(("tasks", "wanted", "present", "cpus"), [(1, None, 64, 64), (8, None, 64, 8), (8, 16, 64, 8)])
def test_a_step_never_asks_for_more_cpus_than_the_job_has(
    tmp_path: Path, tasks: int, wanted: int | None, present: int, cpus: int
) -> None:
    stage = stub("train", "", tasks_per_node=tasks, cpus_per_task=wanted)
    argv = srun_argv(stage, ["a"], plan=plan_of(tmp_path), python="p", cpus_per_node=present)
    assert f"--cpus-per-task={cpus}" in argv


def test_the_srun_call_that_attaches(tmp_path: Path) -> None:
    argv = attach_argv("7", "node03", ["bash", "-i"], run_dir="/shared/a run", terminal=True)
    check_golden("attach.srun", "\n".join(argv) + "\n")
    assert "--pty" not in attach_argv("7", "node03", ["hostname"], run_dir="/shared/a run", terminal=False)


@pytest.mark.parametrize(
    ("request_as", "kind", "flag"),
    [
        ("gres", None, "--gres=gpu:8"),
        ("gres", "h100", "--gres=gpu:h100:8"),
        ("gpus-per-node", None, "--gpus-per-node=8"),
        ("gpus-per-node", "h100", "--gpus-per-node=h100:8"),
        ("none", "h100", None),
    ],
)
def test_gpus_are_asked_for_as_the_cluster_wants_it(
    tmp_path: Path, request_as: str, kind: str | None, flag: str | None
) -> None:
    plan = plan_of(tmp_path, gpus_per_node=8, gpu_request=request_as, gpu_type=kind)
    argv = srun_argv(stub("ray-head", "", gpus_per_node=8), ["a"], plan=plan, python="p", cpus_per_node=1)
    assert [word for word in argv if "gpu" in word] == ([flag] if flag else [])


CONTAINERS = {
    "pyxis": {"runtime": "pyxis", "image": "/shared/images/vime 1.sqsh", "options": "--container-writable"},
    "apptainer": {
        "runtime": "apptainer", "image": "/shared/images/vime 1.sif", "mounts": ["/scratch:/scratch:ro"],
        "python": "/opt/venv/bin/python",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_srun_call_of_a_container(tmp_path: Path, name: str) -> None:
    plan = plan_of(tmp_path, gpus_per_node=8, gpu_request="gpus-per-node", container=CONTAINERS[name])
    plan = plan.model_copy(update={"base_dir": "/shared/models", "run_dir": "/shared/it's a run"})
    stage = stub("ray-head", "", gpus_per_node=8)
    argv = srun_argv(stage, ["node01"], plan=plan, python=step_python(plan.cluster), cpus_per_node=64)
    check_golden(f"container-{name}.srun", "\n".join(argv) + "\n")
    # The controller itself runs outside.
    assert "images" not in sbatch_text(plan)
    assert f"exec {shlex.quote(PYTHON)}" in sbatch_text(plan)


def test_a_folder_that_cannot_be_mounted_is_refused(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, run_dir="/shared/a:b", container=CONTAINERS["pyxis"])
    with pytest.raises(BadInput, match="/shared/a:b cannot be mounted"):
        check_container(plan)
    check_container(plan_of(tmp_path, run_dir="/shared/a:b"))


def test_srun_does_not_inherit_the_jobs_own_options() -> None:
    own = {"SLURM_CPUS_PER_TASK": "4", "SLURM_NTASKS": "9", "SLURM_MEM_PER_NODE": "1", "SRUN_DEBUG": "3"}
    environ = {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/x", "HOME": "/root", **own}
    assert step_environment(environ) == {"SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/x", "HOME": "/root"}


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        (" ***", Cause.CANCELLED),
        (" DUE TO TIME LIMIT ***", Cause.TIME_LIMIT),
        (" DUE TO JOB REQUEUE ***", Cause.PREEMPTED),
        (" DUE TO PREEMPTION ***", Cause.PREEMPTED),
        (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", Cause.NODE_FAILURE),
    ],
)
def test_slurms_last_message_tells_why_the_job_ends(end: str, cause: Cause) -> None:
    line = "slurmstepd-node01: error: *** JOB 7 ON node01 CANCELLED AT 2026-01-02T03:04:05"
    assert cause_of_message(f"stage-start train\n{line}{end}\n") is cause
    assert (
        cause_of_message("slurmstepd-node01: error: *** STEP 7.1 ON node01 CANCELLED AT 2026-01-02T03:04:05 ***")
        is None
    )


@pytest.mark.parametrize(("text", "cpus"), [("64(x3),32", 32), ("8", 8), ("", None)])
def test_cpus_of_the_least_node(text: str, cpus: int | None) -> None:
    assert cpus_per_node({"SLURM_JOB_CPUS_PER_NODE": text}) == cpus


def test_a_job_is_read_from_what_scontrol_says() -> None:
    text = (
        "JobId=12 JobName=my run UserId=root(0) Comment=vime: ray-head of a run JobState=PENDING Reason=NodeDown "
        "Restarts=2 StartTime=2026-01-02T03:04:05 EndTime=Unknown NodeList=(null) Command=/a b/c.sh"
    )
    job = parse_job(text)
    assert job is not None
    assert (job.job_id, job.state, job.reason, job.restarts) == ("12", "PENDING", "NodeDown", 2)
    assert (job.comment, job.nodelist, job.end) == ("vime: ray-head of a run", "", None)
    assert job.start is not None
    assert re.match(r"\d+\.0", str(job.start))


@pytest.mark.parametrize(
    ("comment", "site", "shown"),
    [
        ("", "", "vime: train"),
        ("vime: ray-head", "", "vime: train"),
        ("exempt-from-reaper", "exempt-from-reaper", "exempt-from-reaper; vime: train"),
        ("exempt; vime: cast", "exempt", "exempt; vime: train"),
        ('{"reaper": "exempt"}', '{"reaper": "exempt"}', None),
    ],
)
def test_what_a_site_reads_in_the_comment_stays(comment: str, site: str, shown: str | None) -> None:
    assert site_comment(comment) == site
    assert with_comment(site, "vime: train") == shown


def test_an_image_replaces_none_of_the_runs_variables(tmp_path: Path) -> None:
    """Images of vendors set PYTHONPATH; secrets do not stand on a command line."""
    own = {"NCCL_DEBUG": "INFO", "WANDB_API_KEY": "a-secret"}
    environ = {**own, "PYTHONPATH": "/shared/run/code", "PYTHONSAFEPATH": "1", "HOME": "/home/ada"}
    pyxis = plan_of(tmp_path, env=own, container=CONTAINERS["pyxis"])
    (option,) = [word for word in srun_options(pyxis) if word.startswith("--container-env=")]
    assert {"NCCL_DEBUG", "WANDB_API_KEY", "PYTHONPATH", "PYTHONSAFEPATH", "VIME_PLACES"} <= set(option[16:].split(","))
    assert environment(pyxis, environ) == {}
    apptainer = plan_of(tmp_path, env=own, container=CONTAINERS["apptainer"])
    inside = environment(apptainer, environ)
    assert inside["APPTAINERENV_PYTHONPATH"] == "/shared/run/code"
    assert inside["APPTAINERENV_PYTHONNOUSERSITE"] == "1"
    assert "APPTAINERENV_HOME" not in inside
    assert "a-secret" not in " ".join(wrap(apptainer, stub("train", ""), ["python3"]))


@pytest.mark.parametrize("name", PROFILES)
def test_submitit_would_write_the_same_script(tmp_path: Path, name: str) -> None:
    """The job runs in submitit's environment, so its script has to stay submitit's."""
    from submitit.slurm.slurm import _make_sbatch_string

    plan = plan_of(tmp_path, **PROFILES[name])
    options = sbatch_options(plan)
    known = {key.replace("-", "_"): value for key, value in options.items() if key in ("job-name", "nodes", "time")}
    text = _make_sbatch_string(
        command=sbatch_text(plan).splitlines()[-1],
        folder=submit_folder(plan),
        setup=setup_lines(plan),
        wckey=None,  # pyright: ignore[reportArgumentType]
        stderr_to_stdout=True,
        use_srun=False,
        additional_parameters={key: value for key, value in options.items() if key.replace("-", "_") not in known},
        **known,  # pyright: ignore[reportArgumentType]
    )
    assert text == sbatch_text(plan)
