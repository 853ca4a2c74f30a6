"""Every check of preflight: what it refuses, and how it names node, check, value and need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.launch_stub import make_plan, stub
from tests.support.preflight_findings import finding, gpu
from vime.node.checks import Known, broken_gpus, problems, shared_memory_bytes
from vime.run.plan import Artefact, Plan

OTHERS = "as on other nodes"


def plan_of(tmp_path: Path, **options: Any) -> Plan:
    output = Artefact(name="out", path="/shared/out", kind="hf", bytes=5 * 10**12)
    saves = Artefact(name="checkpoints", path="/shared/saves", kind="run", bytes=2 * 10**12)
    stages = [stub("cast", "pass", outputs=(output,)), stub("train", "pass", outputs=(saves,))]
    return make_plan(tmp_path, stages, nodes=3, kind="slurm", host_bytes=10**9, **options)


def told(plan: Plan, second: dict[str, Any], known: Known | None = None, **everywhere: Any) -> list[str]:
    """Problems of three nodes, of which the second is another."""
    findings = {0: finding(1, **everywhere), 1: {**finding(2, **everywhere), **second}, 2: finding(3, **everywhere)}
    return [str(problem) for problem in problems(plan, findings, known or Known(canary="word"))]


def test_equal_and_healthy_nodes_have_no_problem(tmp_path: Path) -> None:
    assert told(plan_of(tmp_path), {}) == []


def spaces(free: int, *, present: int = 0, device: int = 2) -> dict[str, Any]:
    at = {"device": 1, "free": 10**9, "present": 0}
    saves = {"device": 1 + (device > 1), "free": free, "present": 0}
    return {"/run": at, "/shared/out": {"device": device, "free": free, "present": present}, "/shared/saves": saves}


BAD = [
    ({"memory_available": 5 * 10**8}, "available host memory is 0.5 GB, needs 1.0 GB"),
    ({"memory_group": 4 * 10**8}, "host memory left in the job's memory group is 0.4 GB, needs 1.0 GB"),
    ({"versions": {"python": "3.12.1", "torch": "2.13.0"}}, f"version of python is 3.12.1, needs 3.11.2, {OTHERS}"),
    ({"versions": {"python": "3.11.2"}}, f"version of torch is missing, needs 2.13.0, {OTHERS}"),
    ({"run_folder": "cannot be written: Read-only file system"}, "is cannot be written: Read-only file system, needs"),
    ({"canary": None}, "is another one than the controller's, needs to be shared by all nodes"),
    ({"address": "127.0.0.1"}, "address is 127.0.0.1, needs one of its own that other nodes reach"),
    ({"space": spaces(6 * 10**12)}, "free space for /shared/out is 6000.0 GB, needs 7000.0 GB"),
    ({"limits": {"open_files": 1024, "locked_memory": None}}, "limit of open files (ulimit -Hn) is 1024, needs 8192"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD)
def test_a_node_is_refused_with_the_check_the_value_and_the_need(
    tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    found = told(plan_of(tmp_path), change)
    assert len(found) == 1
    assert found[0].startswith("node02: ")
    assert text in found[0]


def test_the_least_memory_limit_counts_and_slurms_is_one(tmp_path: Path) -> None:
    found = told(plan_of(tmp_path), {}, Known(canary="word", job_memory={0: 10**9, 1: 3 * 10**8}))
    assert found == ["node02: host memory that Slurm gives the job is 0.3 GB, needs 1.0 GB"]


def test_two_nodes_with_one_address_are_both_refused(tmp_path: Path) -> None:
    assert len(told(plan_of(tmp_path), {"address": "10.0.0.1"})) == 2


def test_space_that_is_used_by_what_is_there_already_is_not_needed_again(tmp_path: Path) -> None:
    assert told(plan_of(tmp_path), {"space": spaces(3 * 10**12, present=4 * 10**12)}) == []


def test_a_folder_whose_files_the_controller_does_not_see_is_not_shared(tmp_path: Path) -> None:
    assert "controller does not see" in told(plan_of(tmp_path), {}, Known(canary="word", unseen=(1,)))[0]


def test_an_rdma_port_that_other_nodes_have_must_be_active(tmp_path: Path) -> None:
    rails = {"mlx5_0:1": "ACTIVE", "mlx5_1:1": "ACTIVE"}
    (found,) = told(plan_of(tmp_path), {"rdma": {**rails, "mlx5_1:1": "DOWN"}}, rdma=rails)
    assert found == f"node02: list of active RDMA ports is mlx5_0:1, needs mlx5_0:1 mlx5_1:1, {OTHERS}"
    assert told(plan_of(tmp_path), {"rdma": {**rails, "mlx5_9:1": "ACTIVE"}}, rdma=rails) == []


def test_locked_memory_must_be_unlimited_for_rdma(tmp_path: Path) -> None:
    ports = {"mlx5_0:1": "ACTIVE"}
    limited = {"limits": {"open_files": 65536, "locked_memory": 8 * 2**20}}
    assert told(plan_of(tmp_path), limited) == []
    assert told(plan_of(tmp_path), limited, rdma={"mlx5_0:1": "DOWN"}) == [], "nobody can use a port that is down"
    assert "ulimit -Hl) is 0.0 GB, needs unlimited for RDMA" in told(plan_of(tmp_path), limited, rdma=ports)[0]


@pytest.mark.parametrize("off", [{"NCCL_IB_DISABLE": "1"}, {"NCCL_NET": "Socket"}])
def test_rdma_that_is_switched_off_is_not_looked_at(tmp_path: Path, off: dict[str, str]) -> None:
    """An Ethernet cluster whose network cards show RDMA devices all the same, on some nodes."""
    plan = plan_of(tmp_path, cluster={"env": off})
    limited = {"limits": {"open_files": 65536, "locked_memory": 65536}, "rdma": {}}
    assert told(plan, limited, rdma={"mlx5_0:1": "ACTIVE"}) == []


LOCAL = {"shared_memory": 10**12, "folder": "/scratch/vime-1000", "free": 10**12, "socket": 107}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, None),
        ({"shared_memory": 64 * 2**20}, "free space of /dev/shm is 0.1 GB, needs 0.1 GB (Ray's object store, engines)"),
        (
            {"free": 10**8},
            "node-local files in /scratch/vime-1000 is 0.1 GB, needs 0.2 GB, or VIME_NODE_TMP on another",
        ),
        ({"socket": 108}, "socket below /scratch/vime-1000 is 108 characters long, needs at most 107 characters"),
    ],
)
def test_what_processes_need_on_the_node_itself(tmp_path: Path, change: dict[str, Any], text: str | None) -> None:
    found = told(plan_of(tmp_path), {"node_local": {**LOCAL, **change}})
    assert [(text or "") in line for line in found] == ([True] if text else [])


def test_every_engine_of_the_fullest_node_counts_for_shared_memory(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    node = plan.nodes[0].model_copy(update={"engines": (0, 1)})
    two = plan.model_copy(update={"nodes": (node, *plan.nodes[1:])})
    assert shared_memory_bytes(two) - shared_memory_bytes(plan) == 2 * 160 * 2**20


@pytest.mark.parametrize(("clock", "text"), [(1010.0, "5 s ahead of"), (990.0, "8 s behind"), (1000.0, None)])
def test_a_clock_must_lie_between_two_moments_of_the_controllers(
    tmp_path: Path, clock: float, text: str | None
) -> None:
    known = Known(canary="word", moments=dict.fromkeys(range(3), (998.0, 1005.0)))
    found = told(plan_of(tmp_path), {"time": clock}, known)
    assert found == ([] if text is None else [f"node02: clock is {text} the controller's, needs to be within 2 s"])


def test_a_node_that_failed_twice_is_refused(tmp_path: Path) -> None:
    found = told(plan_of(tmp_path), {}, Known(canary="word", failures={"node02": 2}))
    assert found == ["node02: number of failures in this run is 2, needs a node that failed at most once"]


def smi(*gpus: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"gpus": {"driver": "580.1", "gpus": list(gpus), "xids": [], **changes}}


XID = {"bus": "0000:1a:00", "xid": 79, "meaning": "GPU has fallen off the bus"}
BAD_GPUS = [
    ({"gpus": {}}, "nvidia-smi is missing, needs to tell of the GPUs"),
    ({"gpus": {"error": "nvidia-smi did not answer within 60 s"}}, "nvidia-smi did not answer within 60 s"),
    (smi(), "number of GPUs is 0, needs 1"),
    (smi(gpu(ecc_uncorrectable=3)), "uncorrectable ECC errors since boot of GPU 0 (00000000:00:06.0) is 3, needs 0"),
    (smi(gpu(remap_pending="Yes")), "row remapping of GPU 0 (00000000:00:06.0) is pending, needs a reset of the GPU"),
    (smi(gpu(remap_failed="Yes")), "is failed, needs another GPU"),
    (smi(gpu(recovery_action="GPU Reset")), "recovery action of GPU 0 (00000000:00:06.0) is GPU Reset, needs none"),
    (smi(gpu(mig="Enabled")), "MIG mode of GPU 0 (00000000:00:06.0) is enabled, needs whole GPUs"),
    (smi(gpu(memory_used=9 * 10**9)), "memory in use of GPU 0 (00000000:00:06.0) is 9.0 GB, needs a GPU that"),
    (smi(gpu(name="NVIDIA A100")), "GPU model is ['NVIDIA A100'], needs ['NVIDIA H100 80GB HBM3'], as on other nodes"),
    (smi(gpu(), xids=[XID]), "Xid 79 (GPU has fallen off the bus), needs none in the last day"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD_GPUS)
def test_a_sick_gpu_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    settings = {"gpus_per_node": 1, "gpu_request": "gres"}
    assert told(plan_of(tmp_path, cluster=settings), {}, **smi(gpu())) == []
    found = told(plan_of(tmp_path, cluster=settings), change, **smi(gpu()))
    assert found[0].startswith("node02: ")
    assert text in found[0]
    assert told(plan_of(tmp_path), change, **smi(gpu())) == [], "a plan without GPUs does not look at them"


# -- after training failed --

GPU = {"bus": "9D", "name": "H100", "memory_total": 1, "memory_used": 70 * 2**30, "ecc_uncorrectable": 0,
       "remap_pending": "No", "remap_failed": "No", "recovery_action": None, "mig": "Disabled"}  # fmt: skip


@pytest.mark.parametrize(
    ("told", "broken"),
    [
        ({"gpus": [GPU], "xids": []}, []),
        (
            {"gpus": [{**GPU, "ecc_uncorrectable": 3}], "xids": []},
            ["GPU 0 (9D): uncorrectable ECC errors since boot 3"],
        ),
        ({"gpus": [], "xids": []}, ["0 of 1 GPUs are left"]),
        (
            {"gpus": [GPU], "xids": [{"bus": "9D", "xid": 79, "meaning": "GPU has fallen off the bus"}]},
            ["GPU 9D: Xid 79 (GPU has fallen off the bus)"],
        ),
        ({"error": "nvidia-smi did not answer within 60 s"}, ["nvidia-smi did not answer within 60 s"]),
    ],
)
def test_what_is_broken_of_a_nodes_gpus(tmp_path: Path, told: dict[str, Any], broken: list[str]) -> None:
    assert broken_gpus(make_plan(tmp_path / "run", [stub("train", "pass")]), told, None) == broken
