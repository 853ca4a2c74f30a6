"""Calls of Slurm's programs: what they see of a person's shell, and what of their words is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from vime.slurm.client import SlurmError, call, client_environment, sbatch_environment, step_environment, words_of
from vime.slurm.queue import query_job

CONNECTION = {"SLURM_CONF": "/etc/slurm/here.conf", "SLURM_JWT": "token", "PATH": "/usr/bin", "HOME": "/home/ada"}
SHELL = {
    "SLURM_TIME_FORMAT": "relative", "SLURM_CLUSTERS": "west", "SINFO_FORMAT": "%P", "SINFO_PARTITION": "debug",
    "SQUEUE_USERS": "ada", "SQUEUE_FORMAT": "%i", "SACCT_FORMAT": "jobid", "SCONTROL_ALL": "1",
    "SRUN_CPUS_PER_TASK": "3",
}  # fmt: skip
"""As modules and start-up files of shells set them."""
ALLOCATION = {
    "SLURM_JOB_ID": "5", "SLURM_GPUS_PER_NODE": "1", "SLURM_CPUS_PER_GPU": "2", "SLURM_MEM_PER_CPU": "4000",
    "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPU_BIND": "mask_cpu:0x1", "SLURM_TRES_PER_TASK": "cpu:4",
    "SLURM_HINT": "nomultithread",
}  # fmt: skip


def test_a_client_sees_none_of_its_options_and_no_allocation() -> None:
    assert client_environment({**CONNECTION, **SHELL, **ALLOCATION}) == CONNECTION


def test_sbatch_sees_none_of_the_options_that_a_script_states() -> None:
    """sbatch's variables beat the lines of a script: SBATCH_TIMELIMIT would cut the job short without a word."""
    changing = {
        "SBATCH_TIMELIMIT": "10", "SBATCH_PARTITION": "debug", "SBATCH_GRES": "gpu:1", "SBATCH_NO_REQUEUE": "1",
        "SBATCH_MEM_PER_NODE": "1G", "SBATCH_EXCLUSIVE": "user", "SBATCH_SIGNAL": "USR1@10",
        "SBATCH_OPEN_MODE": "truncate",
    }  # fmt: skip
    own = {"SBATCH_ACCOUNT": "ml-project", "SBATCH_RESERVATION": "workshop", "SBATCH_QOS": "high"}
    environ = {**CONNECTION, **SHELL, **ALLOCATION, **changing, **own}
    assert sbatch_environment(environ) == {**CONNECTION, **own}
    assert sbatch_environment(environ, {"account", "qos", "time"}) == {**CONNECTION, "SBATCH_RESERVATION": "workshop"}


def test_a_step_sees_its_job_and_none_of_the_jobs_defaults() -> None:
    job = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOBID": "5", "SLURM_RESTART_COUNT": "1"}
    assert step_environment({**CONNECTION, **SHELL, **ALLOCATION, **job}) == {**CONNECTION, **job}


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs come before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


SCONTROL = """
case "$SLURM_TIME_FORMAT" in
  %s) start=1780000000; end=1780086400 ;;
  relative) start="10:00:01"; end="Tomorr 10:00:01" ;;
  *) start=Never; end=Never ;;
esac
echo "JobId=7 JobName=r JobState=RUNNING Reason=None StartTime=$start EndTime=$end NodeList=n1"
"""


@pytest.mark.parametrize("shell", ["", "relative", "standard", "%d.%m. %H:%M", "%s"])
def test_times_are_known_whatever_the_shells_format(
    programs: Path, monkeypatch: pytest.MonkeyPatch, shell: str
) -> None:
    program(programs, "scontrol", SCONTROL)
    monkeypatch.setenv("SLURM_TIME_FORMAT", shell)
    job = query_job("7")
    assert job is not None
    assert (job.start, job.end) == (1780000000, 1780086400)


def test_a_program_that_fails_is_quoted_in_full(programs: Path) -> None:
    program(programs, "scontrol", "echo 'scontrol: error: No slots'; echo 'see https://help.example.org'; exit 3")
    with pytest.raises(SlurmError, match=r"exited with 3: scontrol: error: No slots; see https://help.example.org$"):
        call("scontrol", "show", "job")


def test_a_program_that_is_silent_is_named(programs: Path) -> None:
    program(programs, "sinfo", "sleep 5")
    with pytest.raises(SlurmError, match="sinfo -h did not answer within 0 s"):
        call("sinfo", "-h", seconds=0.1)


def test_words_are_on_one_line_and_none_is_lost() -> None:
    lines = ["Rejected by policy:", "", "name an account", "Unspecified error"]
    said = "".join(f"sbatch: error: {line}\n" for line in lines)
    assert words_of(said) == (
        "sbatch: error: Rejected by policy:; sbatch: error: name an account; sbatch: error: Unspecified error"
    )
    assert words_of("\n") == "no message"
    assert len(words_of("x" * 9999)) < 2000
