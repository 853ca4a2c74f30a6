"""Submission of a batch script, and the question whether Slurm would take it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput
from vime.slurm.client import SlurmError, sbatch_environment, words_of
from vime.slurm.queue import jobs_named

SUBMIT_SECONDS = 60.0


def stated_options(script: str) -> set[str]:
    """Names of the options that a script's `#SBATCH` lines state."""
    return set(re.findall(r"^#SBATCH\s+--([a-z-]+)", script, re.MULTILINE))


def parse_job_id(text: str) -> str | None:
    """The job that sbatch says it has queued, with or without a sentence or a cluster around it; None: it does not say.

    `Submitted batch job 12 on cluster a`, `12;a` (--parsable), and the bare `12` of a site's wrapper.
    """
    if match := re.search(r"Submitted batch job (\d+)", text):
        return match[1]
    bare = re.findall(r"^\s*(\d+)(?:;\S+)?\s*$", text, re.MULTILINE)
    return bare[-1] if bare else None


def submit(script: Path, name: str) -> str:
    """Queue a script; the id of its job, whose name is `name`. Raises BadInput; then nothing is queued.

    Where sbatch succeeds with an answer that cannot be read, squeue is asked for the newest job of this name.
    """
    done = _sbatch([str(script)], script.read_text(encoding="utf-8"))
    if done.returncode:
        raise BadInput(f"sbatch refused the job: {words_of(done.stderr or done.stdout)}")
    if (job := parse_job_id(done.stdout)) is not None:
        return job
    try:
        found = jobs_named(name)
    except SlurmError as error:
        raise BadInput(
            f"sbatch queued a job, but its answer {words_of(done.stdout)!r} has no job id, and {error}: "
            f"look for the job {name} in squeue and cancel it"
        ) from error
    if not found:
        raise BadInput(
            f"sbatch's answer {words_of(done.stdout)!r} has no job id, and squeue shows no job {name}: submit again"
        )
    return found[-1]


def check_accepted(scripts: Sequence[str]) -> None:
    """Ask Slurm whether it could ever run these scripts. Raises BadInput with its answer."""
    for script in scripts:
        done = _sbatch(["--test-only"], script, stdin=script)
        if done.returncode:
            raise BadInput(f"Slurm would refuse the job: {words_of(done.stderr or done.stdout)}")


def _sbatch(words: Sequence[str], script: str, *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = sbatch_environment(os.environ, stated_options(script))
    try:
        return subprocess.run(
            ["sbatch", *words],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SUBMIT_SECONDS,
            env=env,
            # Ctrl-C at the terminal reaches this process alone: sbatch may have queued the job already.
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BadInput(
            "there is no sbatch on this machine: submit from a login node, or use --cluster local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BadInput(f"sbatch did not answer within {SUBMIT_SECONDS:.0f} s: is Slurm's controller up?") from error
