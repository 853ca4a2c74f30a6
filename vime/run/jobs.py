"""Slurm jobs of a run, as recorded at submission: one, or one per stage of a chain."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vime.system.files import PRIVATE, write_json
from vime.system.private import private_folder

SUBMIT_FOLDER, JOB_FILE = "submit", "job.json"


@dataclass(frozen=True)
class Job:
    """One job."""

    job_id: str
    link: str | None = None
    """Link of the chain; None for a run that is one job."""


def read_jobs(run_dir: str | os.PathLike[str]) -> tuple[Job, ...]:
    """Jobs of this run's last submission, in order; empty for a local run or before submission."""
    try:
        text = (Path(run_dir) / SUBMIT_FOLDER / JOB_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return tuple(Job(entry["job_id"], entry["link"]) for entry in json.loads(text)["jobs"])


def write_jobs(run_dir: str | os.PathLike[str], jobs: Sequence[Job]) -> None:
    """Replace the recorded jobs."""
    folder = private_folder(Path(run_dir) / SUBMIT_FOLDER)
    write_json(folder / JOB_FILE, {"jobs": [asdict(job) for job in jobs], "time": time.time()}, mode=PRIVATE)


def forget_jobs(run_dir: str | os.PathLike[str]) -> None:
    """Remove the record of jobs, for a run that continues without Slurm."""
    (Path(run_dir) / SUBMIT_FOLDER / JOB_FILE).unlink(missing_ok=True)


def add_job(run_dir: str | os.PathLike[str], job: Job) -> None:
    """Record a hand-submitted job, when it starts and after each requeue."""
    known = [other for other in read_jobs(run_dir) if other.link is not None and other.link != job.link]
    write_jobs(run_dir, [*known, job])
