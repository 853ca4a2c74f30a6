"""Test scheduler that starts nothing: records each submission in `$RECORD` and assigns job numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vime.errors import BadInput
from vime.run.jobs import Job, write_jobs
from vime.run.plan import Plan
from vime.run.scheduler import PATIENCE_S, JobState
from vime.schedulers.local import Local


def submissions() -> list[dict[str, str]]:
    """A submission: run, job and the jobs that it waits for."""
    path = Path(os.environ["RECORD"])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Recorder(Local):
    """Every job is pending for ever."""

    def check(self, plan: Plan) -> None:
        if plan.recipe.optimizer.lr > 1:
            raise BadInput("the recorder takes no such learning rate")

    def after(self, plan: Plan, job_ids: Sequence[str]) -> Plan:
        env = {**plan.cluster.env, "AFTER": " ".join(job_ids)}
        return plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"env": env})})

    def submit(self, plan: Plan) -> int:
        job = str(100 + len(submissions()))
        row = {"run": plan.run_name, "job": job, "after": plan.cluster.env.get("AFTER", "")}
        with Path(os.environ["RECORD"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
        write_jobs(plan.run_dir, [Job(job)])
        return 0

    def job(self, job_id: str, *, timeout_s: float = PATIENCE_S) -> JobState | None:
        return JobState(job_id, "PENDING", "waiting")


class Unordered(Recorder):
    """Knows no job that waits for another."""

    def after(self, plan: Plan, job_ids: Sequence[str]) -> Plan:
        raise BadInput("the recorder cannot order jobs")
