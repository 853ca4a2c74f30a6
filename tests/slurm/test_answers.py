"""How Slurm's answers are read: texts of Slurm 22.05."""

from __future__ import annotations

from vime.slurm.queue import is_lost, parse_job, parse_node_memory, parse_topology

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
    """Where memory is no resource, Slurm gives none, and sets no limit."""
    assert parse_node_memory(JOB)[-2:] == [("node[01-02]", 160000 * 2**20), ("node04", 300 * 2**20)]


def test_nodes_that_a_job_is_kept_off() -> None:
    assert parse_job(JOB).excluded == "node[02-03]"
    assert parse_job("JobId=1 ExcNodeList=(null)").excluded == ""


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
