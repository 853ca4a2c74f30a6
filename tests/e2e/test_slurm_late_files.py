"""A run folder on a file system that shows other nodes' new files late, as NFS does with its default options.

The client is no NFS: bindfs with caches of names, attributes and of names that were not found (slurm/devcluster
nfs-like). It is stricter, since a listing does not refresh it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import folder, make_plan, preflight, service, stub
from tests.support.slurm_cluster import DevCluster, wait_for_end
from vime.run.folder import read_binding
from vime.run.journal import read_events
from vime.schedulers.submission import submit

pytestmark = pytest.mark.e2e
LATE_S = 20


@pytest.fixture
def late(four_nodes: DevCluster, tmp_path: Path) -> Iterator[Path]:
    """A folder in which every node sees the others' new files up to 20 s late."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o700)
    four_nodes.call("nfs-like", str(shared), "--seconds", str(LATE_S))
    yield shared
    four_nodes.call("nfs-like", str(shared), "--off")


def test_the_client_shows_new_files_late(four_nodes: DevCluster, late: Path) -> None:
    """Else the next test would show nothing."""
    look = ["sh", "-c", f"test -e {late}/word && cat {late}/word"]
    assert four_nodes.on_node(1, *look) == ""
    four_nodes.on_node(0, "sh", "-c", f"echo new >{late}/word")
    assert four_nodes.on_node(1, *look) == ""


MAKE = "import pathlib; p = pathlib.Path({path!r}); p.mkdir(); (p / 'model').write_text('weights')"


def test_a_run_whose_nodes_see_each_others_files_late(four_nodes: DevCluster, late: Path) -> None:
    """The nodes look for binding and checkpoint before these exist, and remember that they are missing."""
    run_dir, made = late / "run", late / "made"
    looks = f"import os; print(os.path.exists({str(run_dir / 'binding.json')!r}), os.path.exists({str(made)!r}))"
    output = folder("bf16", made)
    stages = [
        preflight(run_dir, 4).model_copy(update={"deadline_s": 120}),
        stub("look", looks, nodes=range(4)),
        service("ray-head"),
        service("ray-workers", nodes=(1, 2, 3)),
        stub("convert", MAKE.format(path=str(made)), nodes=(2,), outputs=(output,), deadline_s=patience.JOB),
        stub(
            "train",
            f"print(open({str(made / 'model')!r}).read())",
            nodes=range(4),
            inputs=(output,),
            deadline_s=patience.JOB,
        ),
    ]
    make_plan(run_dir, stages, nodes=4, kind="slurm")
    job = submit(make_plan(run_dir, stages, nodes=4, kind="slurm"))
    assert wait_for_end(job, patience.JOB) == "COMPLETED", read_events(run_dir)[-1]
    assert len(read_binding(run_dir).nodes) == 4
    said = [path.read_text().split()[-1] for path in sorted((run_dir / "logs" / "train").glob("node*.log"))]
    assert said == ["weights"] * 4
    four_nodes.assert_nothing_is_left(job, run_dir)
