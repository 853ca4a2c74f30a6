"""Submission of a script: the answers of sbatch, of Slurm 20.11 to 25.05 and of sites' wrappers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vime.errors import BadInput
from vime.slurm.sbatch import check_accepted, parse_job_id, stated_options, submit


@pytest.mark.parametrize(
    ("answer", "job"),
    [
        ("Submitted batch job 4711\n", "4711"),
        ("Submitted batch job 4711 on cluster west\n", "4711"),
        ("4711\n", "4711"),
        ("4711;west\n", "4711"),
        ("Remaining budget: 812 GPU hours\nSubmitted batch job 4711\nHave a nice day\n", "4711"),
        ("  -> project ml, 16 nodes\n4711\n", "4711"),
        ("sbatch: lua: Submitted job using partition gpu\nSubmitted batch job 4711\n", "4711"),
        ("Your job was queued.\n", None),
        ("", None),
    ],
)
def test_a_job_id_is_found_in_every_spelling(answer: str, job: str | None) -> None:
    assert parse_job_id(answer) == job


SCRIPT = "#!/bin/bash\n#SBATCH --time=10\n#SBATCH --exclusive\n#SBATCH --account=ml\n\nexec python3\n"


def test_the_options_of_a_script() -> None:
    assert stated_options(SCRIPT) == {"time", "exclusive", "account"}


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    path = tmp_path / "run.sh"
    path.write_text(SCRIPT)
    return path


def program(tmp_path: Path, name: str, body: str) -> None:
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def test_the_reason_of_a_submit_filter_is_shown(script: Path, tmp_path: Path) -> None:
    reason = [
        "1 PROBLEM",
        "",
        "give an account, one of: vision, speech",
        "Batch job submission failed: Unspecified error",
    ]
    body = "cat >/dev/null\n" + "\n".join(f"echo 'sbatch: error: {line}' >&2" for line in reason) + "\nexit 1"
    program(tmp_path, "sbatch", body)
    for ask in (lambda: submit(script, "run"), lambda: check_accepted([SCRIPT])):
        with pytest.raises(BadInput, match=r"give an account, one of: vision, speech; .*Unspecified error"):
            ask()


def test_variables_that_the_script_states_do_not_reach_sbatch(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SBATCH_TIMELIMIT", "SBATCH_ACCOUNT", "SBATCH_RESERVATION", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "1")
    program(
        tmp_path, "sbatch", f"python3 -c 'import json, os; print(json.dumps(dict(os.environ)))' >{tmp_path}/env; echo 8"
    )
    assert submit(script, "run") == "8"
    seen = json.loads((tmp_path / "env").read_text())
    assert {name for name in seen if name.startswith(("SBATCH_", "SLURM_CLUSTERS"))} == {"SBATCH_RESERVATION"}


def test_an_answer_that_cannot_be_read_makes_squeue_tell_the_job(script: Path, tmp_path: Path) -> None:
    program(tmp_path, "sbatch", "echo 'Your job was queued.'")
    program(tmp_path, "squeue", "echo 'NOTICE: maintenance on Friday'; echo; echo 41; echo 7; [[ $* = *--name=run* ]]")
    assert submit(script, "run") == "41"


@pytest.mark.parametrize(("squeue", "words"), [("true", "squeue shows no job run"), ("exit 1", "cancel it")])
def test_a_job_that_nobody_knows_is_told(script: Path, tmp_path: Path, squeue: str, words: str) -> None:
    program(tmp_path, "sbatch", "echo 'Your job was queued.'")
    program(tmp_path, "squeue", squeue)
    with pytest.raises(BadInput, match=f"'Your job was queued.' has no job id, and .*{words}"):
        submit(script, "run")
