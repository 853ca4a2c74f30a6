"""Partitions from sinfo's lines, and what a submission takes from them."""

from __future__ import annotations

import pytest

from vime.errors import BadInput
from vime.planning.cluster import resolve
from vime.run.plan import Cluster
from vime.slurm.partitions import parse_gpus, parse_partitions, parse_slices, satisfies

LINES = """\
gpu|gpu*|up|14|64|1600000|gpu:h200:8(S:0-1)|7-00:00:00
gpu|gpu*|up|2|32+|800000+|gpu:h200:8,lustre:1|7-00:00:00
cpu|cpu|up|40|128|500000|(null)|infinite
old|old|down|99|8|64000|gpu:2|1:00:00
"""
OPEN = Cluster(name="slurm", kind="slurm")


def test_kinds_of_nodes_of_a_partition_are_kept_apart():
    gpu, cpu, old = parse_partitions(LINES)
    assert (gpu.name, gpu.default, gpu.nodes, len(gpu.kinds)) == ("gpu", True, 16, 2)
    assert [(kind.cpus, kind.memory_bytes, kind.gpus) for kind in gpu.kinds] == [
        (64, 1600000 * 2**20, {"h200": 8}),
        (32, 800000 * 2**20, {"h200": 8}),
    ]
    assert gpu.time_limit_minutes == 7 * 24 * 60
    assert (cpu.kinds[0].gpu_count, cpu.time_limit_minutes) == (0, None)
    assert (old.up, old.kinds[0].gpu_count) == (False, 2)


@pytest.mark.parametrize(
    ("gres", "gpus", "slices"),
    [
        ("(null)", {}, 0),
        ("gpu:8", {"": 8}, 0),
        ("gpu:h100:8(S:0-1)", {"h100": 8}, 0),
        ("gpu:h100:8(S:0-1),shard:h100:64(S:0-1)", {"h100": 8}, 0),
        ("shard:64", {}, 0),
        ("mps:400,gpu:2,lustre:1", {"": 2}, 0),
        ("gpu:a100:4,gpu:a30:2", {"a100": 4, "a30": 2}, 0),
        ("gpu:1g.10gb:56(S:0-1)", {}, 56),
        ("gpu:nvidia_h100_80gb_hbm3:7,gpu:nvidia_h100_80gb_hbm3_1g.10gb:7", {"nvidia_h100_80gb_hbm3": 7}, 7),
        ("gpu:a100_3g.20gb:8", {}, 8),
    ],
)
def test_slices_and_shards_are_no_whole_gpus(gres: str, gpus: dict[str, int], slices: int):
    assert (parse_gpus(gres), parse_slices(gres)) == (gpus, slices)


@pytest.mark.parametrize(
    "text",
    [
        "NOTICE: maintenance on Friday, see status.example.org\n\n{line}\n\n",
        "CLUSTER: west\n{line}\n",
        "CLUSTER: west\nPARTITION|PARTITION|AVAIL|NODES|CPUS|MEMORY|GRES|TIMELIMIT\n{line}\n",
        "{line}|h100,ib\nbye\n",
    ],
)
def test_foreign_lines_are_skipped(text: str):
    line = "h100|h100*|up|24|192|2063000|gpu:h100:8(S:0-1)|2-00:00:00"
    (partition,) = parse_partitions(text.format(line=line))
    assert (partition.name, partition.nodes) == ("h100", 24)


def test_memory_that_is_not_configured_is_not_known():
    (partition,) = parse_partitions("gpu|gpu*|up|24|192|1|gpu:8|infinite\n")
    cluster, notes = resolve(OPEN, 16, [partition], needs_gpus=8)
    assert (partition.kinds[0].memory_bytes, cluster.memory_per_node_bytes) == (None, None)
    assert "memory that Slurm does not know" in notes[0]


MIXED = """\
gpu|gpu*|up|40|40|190000|gpu:v100:4(S:0-1)|3-00:00:00|volta,ib
gpu|gpu*|up|24|192|2063000|gpu:h100:8(S:0-1)|3-00:00:00|hopper,ib,nvme
gpu|gpu*|up|6|128|1031000|gpu:a100:8(S:0-1)|3-00:00:00|ampere,roce
gpu|gpu*|up|2|128|1000000|(null)|3-00:00:00|ib
"""
"""The usual partition of a university."""


@pytest.mark.parametrize(
    ("profile", "nodes", "needs", "cpus", "megabytes", "kind"),
    [
        ({}, 16, 8, 192, 2063000, "h100"),
        ({"constraint": "hopper"}, 16, 8, 192, 2063000, None),
        ({"constraint": "hopper&ib", "gpu_type": "h100", "gpus_per_node": 8}, 16, 8, 192, 2063000, "h100"),
        ({"constraint": "[ampere|hopper]", "gpu_type": "a100"}, 4, 8, 128, 1031000, "a100"),
        ({"gpu_type": "v100"}, 40, 4, 40, 190000, "v100"),
        ({"constraint": "volta"}, 40, 4, 40, 190000, None),
        ({}, 60, 0, 40, 190000, None),
    ],
)
def test_of_a_mixed_partition_only_what_the_request_can_get_counts(
    profile: dict, nodes: int, needs: int, cpus: int, megabytes: int, kind: str | None
):
    cluster, _ = resolve(OPEN.model_copy(update=profile), nodes, parse_partitions(MIXED), needs_gpus=needs)
    assert (cluster.cpus_per_node, cluster.gpu_type) == (cpus, kind)
    assert cluster.memory_per_node_bytes == megabytes * 2**20


@pytest.mark.parametrize(
    ("profile", "nodes", "message"),
    [
        ({}, 25, "needs 25 nodes, but partition gpu has 24 that the request matches, of 40 nodes of 4 v100, 24 nodes"),
        (
            {"constraint": "blackwell"},
            2,
            "no node of partition gpu serves constraint blackwell: its features",
        ),
        ({"gpu_type": "b200"}, 2, "has no GPUs of type b200: it has 40 nodes of 4 v100"),
        ({"constraint": "volta"}, 2, "sinfo shows 4 GPUs a node in partition gpu, but the recipe takes 8"),
    ],
)
def test_what_no_kind_of_node_gives_is_refused_with_the_kinds(profile: dict, nodes: int, message: str):
    with pytest.raises(BadInput, match=message):
        resolve(OPEN.model_copy(update=profile), nodes, parse_partitions(MIXED), needs_gpus=8)


def test_a_partition_of_slices_is_not_chosen():
    text = "mig|mig*|up|20|192|2063000|gpu:1g.10gb:56|3-00:00:00\nh100|h100|up|18|192|2063000|gpu:h100:8|3-00:00:00\n"
    cluster, _ = resolve(OPEN, 16, parse_partitions(text), needs_gpus=8)
    assert (cluster.partition, cluster.gpus_per_node) == ("h100", 8)
    with pytest.raises(BadInput, match=r"sinfo shows 0 GPUs .*20 nodes of 56 MIG slices"):
        resolve(OPEN.model_copy(update={"partition": "mig"}), 16, parse_partitions(text), needs_gpus=8)


def test_a_cluster_without_gres_leads_to_the_option_for_it():
    partitions = parse_partitions("dgx|dgx*|up|24|256|2063000|(null)|infinite\n")
    with pytest.raises(BadInput, match="gpu-request: none where GPUs are no resource of Slurm"):
        resolve(OPEN, 16, partitions, needs_gpus=8)
    profile = OPEN.model_copy(update={"gpu_request": "none", "gpus_per_node": 8})
    assert resolve(profile, 16, partitions, needs_gpus=8)[0].partition == "dgx"


@pytest.mark.parametrize(
    ("constraint", "served"),
    [
        ("h100", True), ("a100", False), ("h100&ib", True), ("h100&roce", False), ("a100|h100", True),
        ("[a100|h100]", True), ("(a100|h100)&ib", True), ("h100*4&ib*2", True), ("h100,ib", True),
        ("a100&ib|h100", True),
        ("h100&", None), ("not h100", None), ("(h100", None), ("h100$", None),
    ],
)  # fmt: skip
def test_constraints(constraint: str, served: bool | None):
    assert satisfies(constraint, frozenset({"h100", "ib", "nvme"})) is served


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
