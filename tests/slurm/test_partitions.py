"""Partitions from sinfo's lines, and what a submission takes from them."""

from __future__ import annotations

import pytest

from vime.errors import BadInput
from vime.planning.cluster import resolve
from vime.run.plan import Cluster
from vime.slurm.partitions import parse_partitions

LINES = """\
gpu|gpu*|up|14|64|1600000|gpu:h200:8(S:0-1)|7-00:00:00
gpu|gpu*|up|2|32+|800000+|gpu:h200:8,lustre:1|7-00:00:00
cpu|cpu|up|40|128|500000|(null)|infinite
old|old|down|99|8|64000|gpu:2|1:00:00
"""
OPEN = Cluster(name="slurm", kind="slurm")


def test_kinds_of_nodes_of_a_partition_are_merged_to_what_all_have():
    gpu, cpu, old = parse_partitions(LINES)
    assert (gpu.name, gpu.default, gpu.nodes, gpu.cpus, gpu.gpus) == ("gpu", True, 16, 32, 8)
    assert gpu.memory_bytes == 800000 * 2**20
    assert gpu.time_limit_minutes == 7 * 24 * 60
    assert (cpu.gpus, cpu.time_limit_minutes) == (0, None)
    assert (old.up, old.gpus) == (False, 2)


def test_without_a_profile_the_default_partition_fills_in_what_is_open_and_is_said():
    cluster, notes = resolve(OPEN, 16, parse_partitions(LINES), needs_gpus=8)
    assert (cluster.partition, cluster.gpus_per_node, cluster.cpus_per_node) == ("gpu", 8, 32)
    assert "partition gpu chosen: 16 nodes of 32 CPUs, 8 GPUs" in notes[0]


def test_a_profile_keeps_what_it_says():
    profile = OPEN.model_copy(update={"partition": "cpu", "cpus_per_node": 100, "time_limit_minutes": 60})
    cluster, notes = resolve(profile, 40, parse_partitions(LINES), needs_gpus=0)
    assert (cluster.partition, cluster.cpus_per_node, cluster.time_limit_minutes) == ("cpu", 100, 60)
    assert (cluster.gpus_per_node, notes) == (0, [])


def test_the_time_limit_is_no_longer_than_the_partitions():
    long = OPEN.model_copy(update={"time_limit_minutes": 30 * 24 * 60})
    cluster, notes = resolve(long, 1, parse_partitions(LINES), needs_gpus=8)
    assert cluster.time_limit_minutes == 7 * 24 * 60
    assert "the longest that partition gpu gives" in notes[0]


def test_a_partition_without_the_gpus_that_the_recipe_takes_is_refused():
    with pytest.raises(BadInput, match="sinfo shows 0 GPUs a node in partition cpu, but the recipe takes 8"):
        resolve(OPEN.model_copy(update={"partition": "cpu"}), 1, parse_partitions(LINES), needs_gpus=8)


def test_a_partition_that_is_too_small_or_unknown_is_refused():
    with pytest.raises(BadInput, match="needs 17 nodes, but partition gpu has 16"):
        resolve(OPEN, 17, parse_partitions(LINES.replace("|40|", "|4|")), needs_gpus=8)
    with pytest.raises(BadInput, match="there is no partition big: give one of gpu, cpu, old"):
        resolve(OPEN.model_copy(update={"partition": "big"}), 1, parse_partitions(LINES), needs_gpus=8)
    with pytest.raises(BadInput, match="no partition that is up"):
        resolve(OPEN, 1, parse_partitions(LINES.splitlines()[-1]), needs_gpus=0)
