"""Facts that a node reports about itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import folder, make_plan, preflight, stub
from tests.support.preflight_findings import finding
from vime.node.network import rdma_ports
from vime.node.preflight import group_limits, limits, look
from vime.run import canary
from vime.system.files import PRIVATE, write_file


def test_this_machine_tells_everything_that_is_asked(tmp_path: Path) -> None:
    output = folder("out", tmp_path / "deep" / "out")
    plan = make_plan(tmp_path, [preflight(tmp_path, 1), stub("cast", "pass", outputs=(output,))])
    (tmp_path / "control").mkdir()
    word = canary.release_canary(tmp_path)
    facts = look(plan)
    assert set(facts) == set(finding(1))
    assert (facts["run_folder"], facts["canary"]) == (None, word)
    assert facts["memory_available"] > 10**8
    assert facts["versions"]["python"].startswith("3.")
    assert facts["space"][output.path]["free"] > 0
    assert facts["space"][output.path]["device"] == os.stat(tmp_path).st_dev
    assert limits()["open_files"] != 0


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Without its `control` folder nothing can be written there."""
    assert "cannot be written: No such file" in look(make_plan(tmp_path, [preflight(tmp_path, 1)]))["run_folder"]


def test_the_controller_sees_the_canaries_of_its_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "control").mkdir()
    monkeypatch.setattr(canary, "SEEN_DEADLINE_S", 0.2)
    first = canary.release_canary(tmp_path)
    canary.answer_canary(tmp_path)
    here = socket.gethostname()
    assert canary.hosts_unseen(tmp_path, {here, "elsewhere"}) == {"elsewhere"}
    assert canary.release_canary(tmp_path) != first
    assert canary.hosts_unseen(tmp_path, {here}) == {here}, "an answer to an earlier start does not count"


def test_every_memory_limit_on_the_way_to_the_root_is_told(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    for name, limit, used in (("job", "1000", "100"), ("job/step", "max", "50"), ("job/step/task", "800", "50")):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "memory.max").write_text(limit)
        (groups / name / "memory.current").write_text(used)
    process = tmp_path / "cgroup"
    process.write_text("0::/job/step/task\n")
    assert sorted(group_limits(process, groups)) == [750, 900]


def test_rdma_ports_are_told_with_their_state(tmp_path: Path) -> None:
    for device, port, state in (("mlx5_0", "1", "4: ACTIVE"), ("mlx5_1", "1", "1: DOWN")):
        (tmp_path / device / "ports" / port).mkdir(parents=True)
        (tmp_path / device / "ports" / port / "state").write_text(state + "\n")
    assert rdma_ports(tmp_path) == {"mlx5_0:1": "ACTIVE", "mlx5_1:1": "DOWN"}
    assert rdma_ports(tmp_path / "nothing") == {}


def test_a_listing_that_is_old_refuses_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An NFS client that shows the folder as it was 30 s ago."""
    (tmp_path / "control").mkdir()
    canary.release_canary(tmp_path)
    old = canary.names_in(tmp_path / "control")
    monkeypatch.setattr(canary, "names_in", lambda folder: old)
    canary.answer_canary(tmp_path)
    assert canary.hosts_unseen(tmp_path, {socket.gethostname()}) == set()


def test_a_node_waits_for_the_word_that_it_was_told(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    old = canary.release_canary(tmp_path)
    path = tmp_path / "control" / ".canary"
    threading.Timer(0.5, lambda: write_file(path, "new", mode=PRIVATE)).start()
    assert canary.read_canary(tmp_path) == old
    assert canary.read_canary(tmp_path, "new") == "new"


STATISTICS = {
    "memory.max": "anon 300\nfile 600\nshmem 100\nactive_file 200\ninactive_file 300\nslab_reclaimable 50\n",
    "memory.limit_in_bytes": "active_file 1\ninactive_file 1\ntotal_active_file 250\ntotal_inactive_file 300\n",
}
"""550 bytes of page cache and the like, with both versions of cgroups; the 100 of shared memory are no cache."""


@pytest.mark.parametrize(
    ("line", "folder", "limit", "usage"),
    [
        ("0::/pods/job", "pods/job", "memory.max", "memory.current"),
        ("4:memory:/pods/job", "memory/pods/job", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ],
)
def test_memory_that_the_kernel_takes_back_is_not_used(
    tmp_path: Path, line: str, folder: str, limit: str, usage: str
) -> None:
    group = tmp_path / folder
    group.mkdir(parents=True)
    (group / limit).write_text("1000")
    (group / usage).write_text("900")
    (group / "memory.stat").write_text(STATISTICS[limit])
    process = tmp_path / "cgroup"
    process.write_text(f"{line}\n")
    assert group_limits(process, tmp_path) == [650]


LOW_LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from vime.node.preflight import limits
print(limits()["open_files"], min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 2**20))
"""


def test_soft_limits_are_raised_before_they_are_looked_at() -> None:
    """As of a login shell whose limits came along with the job."""
    done = subprocess.run([sys.executable, "-c", LOW_LIMIT], capture_output=True, text=True, timeout=patience.PROCESS)
    seen, hard = done.stdout.split()
    assert seen == hard
