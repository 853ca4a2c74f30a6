"""How Slurm's answers are read: texts as Slurm 20.11 to 25.05 print them, with what sites print around them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.slurm_cluster import wait_until
from vime.slurm import queue
from vime.slurm.client import SlurmError
from vime.slurm.queue import is_lost, loss_text, parse_job, parse_node_memory, parse_time, parse_topology

JOB = """\
JobId=12 JobName=a run
   JobState=PENDING Reason=BeginTime Dependency=(null)
   ReqNodeList=(null) ExcNodeList=node[02-03]
   Nodes=node[01-03] CPU_IDs=0-63 Mem=160000 GRES=gpu:8(IDX:0-7)
     Nodes=node[01-02] CPU_IDs=0-63 Mem=160000 GRES=gpu:8(IDX:0-7)
     Nodes=node04 CPU_IDs=0-3 Mem=300 GRES=
     Nodes=node05 CPU_IDs=0-3 Mem=0 GRES=
"""


def test_memory_of_a_job_on_its_nodes() -> None:
    """Slurm gives no memory and sets no limit on a cluster where memory is no resource."""
    assert parse_node_memory(JOB)[-2:] == [("node[01-02]", 160000 * 2**20), ("node04", 300 * 2**20)]


def test_nodes_that_a_job_is_kept_off() -> None:
    excluded = [job and job.excluded for job in map(parse_job, (JOB, "JobId=1 ExcNodeList=(null)"))]
    assert excluded == ["node[02-03]", ""]


def test_leaf_switches() -> None:
    text = """\
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=node[01-02]
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=node[03-04]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=node[01-04] Switches=leaf[1-2]
"""
    assert parse_topology(text) == [("leaf1", "node[01-02]"), ("leaf2", "node[03-04]")]
    assert parse_topology("No topology information available\n") == []


def test_lost_nodes() -> None:
    lost = {
        state
        for state in ("down", "down*", "idle*", "allocated*", "fail", "idle", "mixed", "draining")
        if is_lost(state)
    }
    assert lost == {"down", "down*", "idle*", "allocated*", "fail"}


@pytest.mark.parametrize(
    ("state", "phase"),
    [
        ("PENDING", "waiting"), ("REQUEUED", "waiting"), ("REQUEUE_HOLD", "waiting"), ("REQUEUE_FED", "waiting"),
        ("SPECIAL_EXIT", "waiting"), ("RESV_DEL_HOLD", "waiting"), ("LAUNCH_FAILED", "waiting"),
        ("RECONFIG_FAIL", "waiting"),
        ("POWER_UP_NODE", "waiting"), ("EXPEDITING", "waiting"), ("A_STATE_OF_THE_FUTURE", "waiting"),
        ("RUNNING", "running"), ("COMPLETING", "running"), ("CONFIGURING", "running"), ("SUSPENDED", "running"),
        ("STOPPED", "running"), ("SIGNALING", "running"), ("STAGE_OUT", "running"), ("RESIZING", "running"),
        ("COMPLETED", "ended"), ("CANCELLED", "ended"), ("CANCELLED by 1000", "ended"), ("CANCELLED+", "ended"),
        ("FAILED", "ended"), ("TIMEOUT", "ended"), ("NODE_FAIL", "ended"), ("PREEMPTED", "ended"),
        ("BOOT_FAIL", "ended"), ("DEADLINE", "ended"), ("OUT_OF_MEMORY", "ended"), ("REVOKED", "ended"),
    ],
)  # fmt: skip
def test_states_that_end_a_job_are_listed_and_all_others_are_live(state: str, phase: str) -> None:
    job = parse_job(f"JobId=7 JobState={state}")
    assert job is not None
    assert (job.phase, job.active) == (phase, phase != "ended")


LINE = "JobId=7 JobName=r UserId=ada(1) JobState=RUNNING Reason=None Restarts=2 NodeList=n[1-2] Comment=(null)"


@pytest.mark.parametrize(
    "text",
    [
        f"{LINE}\n",
        f"CLUSTER: west\n{LINE}\n",
        f"NOTICE: storage is slow today\n\n{LINE}\n\nsee status.example.org\n",
        f"slurm_load: warning JobId=3 is old\n{LINE}",
    ],
)
def test_foreign_lines_around_a_job_are_skipped(text: str) -> None:
    job = parse_job(text)
    assert job is not None
    assert (job.job_id, job.state, job.restarts, job.nodelist, job.comment) == ("7", "RUNNING", 2, "n[1-2]", "")


def test_no_job_is_made_of_foreign_lines() -> None:
    assert parse_job("NOTICE: maintenance\n") is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1780000000", 1780000000), ("Unknown", None), ("N/A", None), ("NONE", None), ("", None), ("Tomorr 10:00", None)],
)
def test_times(text: str, seconds: int | None) -> None:
    assert parse_time(text) == seconds


def test_slurms_standard_time_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert parse_time("2026-05-28T20:26:40") == 1780000000


ANSWERS = {
    "sacct": "Welcome to accounting!\n7|CANCELLED by 1000|n[1-2]|1780000000|1780000100\n70|FAILED|n9|1|2\n|odd|\n",
    "squeue": "CLUSTER: west\n7.0 vime-train\n7.1 vime-ray-head\n7.2 vime-train\n17.0 vime-train\n\n",
    "sinfo": "NOTICE everyone\nn2 down*\nn1 allocated\nn1 allocated\nn9 idle\nPARTITION STATE\n",
}
"""With lines that are not Slurm's."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*argv: str, **options: object) -> str:
        if argv[0] not in ANSWERS:
            raise SlurmError("slurm_load_jobs error: Invalid job id specified")
        return ANSWERS[argv[0]]

    monkeypatch.setattr(queue, "call", answer)


def test_foreign_lines_around_rows_are_skipped(answers: None) -> None:
    job = queue.query_job("7")
    assert job is not None
    assert (job.state, job.nodelist, job.start, job.end) == ("CANCELLED", "n[1-2]", 1780000000, 1780000100)
    assert queue.query_job("8") is None
    assert queue.step_ids("7", "vime-train") == ["7.0", "7.2"]
    assert queue.node_states("n[1-2]") == {"n1": "allocated", "n2": "down*"}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ("down", "is down for Slurm"),
        ("down*", "is down for Slurm"),
        ("allocated*", "does not answer Slurm (allocated*)"),
        ("failing", "is failing for Slurm"),
    ],
)
def test_a_lost_node_is_told_of_as_slurm_sees_it(state: str, text: str) -> None:
    assert loss_text(state) == text


def test_nobody_waits_for_a_signal_to_reach_a_lost_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scancel, said = tmp_path / "scancel", tmp_path / "said"
    scancel.write_text(f'#!/bin/sh\necho "$@" > {said}.new && mv {said}.new {said}\nexec sleep 3600\n')
    scancel.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    began = time.monotonic()
    with queue.signalling(["7.0", "7.2"], "TERM"):
        wait_until(said.exists, patience.PROCESS)
    assert said.read_text().split() == ["-s", "TERM", "7.0", "7.2"]
    assert time.monotonic() - began < patience.PROCESS
    with queue.signalling([], "TERM"):
        pass
