"""Everything that may befall a run on a cluster: it ends in time, with the right last word, and leaves nothing.

Each at four nodes, those of AT_SIXTEEN at sixteen too, and all of them at sixteen with `--full`. The stages are stubs;
where Ray's own death is the fault, Ray is real.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import MINUTES, READY, make_plan, preflight, ray_stages, service, stub
from tests.support.slurm_cluster import STATE, DevCluster, bring_up, wait_for_end, wait_for_event, wait_until
from tests.support.slurm_scene import HANG, Scene, node_name, scene
from vime.planning import ports
from vime.run.folder import read_binding, read_plan
from vime.run.journal import Journal, read_events
from vime.run.plan import Stage
from vime.schedulers.submission import submit
from vime.slurm import queue as slurm

pytestmark = pytest.mark.e2e

AT_SIXTEEN = ("test_a_node_is_lost", "test_a_raylet_is_killed", "test_the_job_is_preempted")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full") or metafunc.function.__name__ in AT_SIXTEEN
    metafunc.parametrize("cluster", [4, 16] if full else [4], indirect=True, scope="module")


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest, cluster_before: None) -> DevCluster:
    return bring_up(request.param)


@pytest.fixture
def run(cluster: DevCluster, tmp_path: Path) -> Iterator[Scene]:
    with scene(cluster, tmp_path / 'it\'s a "run" & größe $HOME') as made:
        yield made


@pytest.fixture
def run_on_small(cluster: DevCluster, tmp_path: Path) -> Iterator[Scene]:
    """A run whose folder lies on the cluster's small shared file system."""
    with scene(cluster, STATE / "small" / tmp_path.name) as made:
        yield made


# -- Ray --


def test_a_raylet_is_killed(run: Scene) -> None:
    run.start(*ray_stages(run.run_dir, run.nodes), run.training())
    run.until_said("train", "training", patience.JOB)
    run.kill(run.last_node, "raylet")
    run.ends("CRASH", stage="ray-workers", node=run.last_node, within_s=patience.NOTICE, text="raylet")


def test_the_head_of_ray_is_killed(run: Scene) -> None:
    run.start(*ray_stages(run.run_dir, run.nodes), run.training())
    run.until_said("train", "training", patience.JOB)
    run.kill(0, "gcs_server")
    run.ends("CRASH", stage="ray-head", node=0, within_s=patience.NOTICE, text="gcs_server")


# -- nodes --


def test_a_node_is_lost(run: Scene) -> None:
    run.start_training()
    run.fault("node-kill", run.last_node, mend="node-start")
    run.ends("NODE_FAILURE", stage="train", node=run.last_node, within_s=patience.NOTICE, requeued=True)
    run.mend()
    run.goes_on()


def test_a_spare_takes_the_place_of_a_lost_node(run: Scene) -> None:
    """In the same allocation: the job never waits in the queue again."""
    run.start_training(nodes=run.nodes - 1, spares=1)
    host = read_binding(run.run_dir).nodes[-1].host
    lost = next(node for node in range(1, run.nodes) if node_name(node) == host)
    run.fault("node-kill", lost, mend="node-start")
    run.ends("NODE_FAILURE", stage="train", node=lost, within_s=patience.NOTICE, requeued=True)
    run.goes_on(left_out=lost)
    starts = [event.data for event in run.events() if event.kind == "run-start"]
    assert [(start["restart"], start.get("attempt", 0)) for start in starts] == [(0, 0), (0, 1)]
    assert host not in [node.host for node in read_binding(run.run_dir).nodes]
    run.mend()


def test_the_batch_host_is_lost(run: Scene) -> None:
    """The controller dies with it: the next start tells of it."""
    run.start_training()
    run.fault("node-kill", 0, mend="node-start")
    wait_until(lambda: (s := slurm.job_state(run.job)) and s.state == "PENDING", patience.SLURM)
    run.mend()
    run.ends("NODE_FAILURE", stage="train", node=0, within_s=patience.SLURM, text="left no last word", requeued=True)
    run.goes_on()


def test_a_node_that_is_lost_for_the_second_time_is_left_out(run: Scene) -> None:
    """Every node's first time stands in the journal. The job asks for one node less than there are."""
    run.run_dir.mkdir(parents=True)
    journal, others = Journal(run.run_dir), range(1, run.nodes)
    for node in others:
        journal.write("run-end", "earlier", node=node_name(node), data={"cause": "NODE_FAILURE", "requeued": True})
    run.start_training(nodes=run.nodes - 1)
    host = read_binding(run.run_dir).nodes[-1].host
    lost = next(node for node in others if node_name(node) == host)
    run.fault("node-kill", lost, mend="node-start")
    run.ends("NODE_FAILURE", stage="train", node=lost, within_s=patience.NOTICE, requeued=True, count=len(others) + 1)
    state = slurm.job_state(run.job)
    assert state is not None
    assert state.excluded == host
    run.mend()
    run.goes_on(left_out=lost)
    assert host not in [node.host for node in read_binding(run.run_dir).nodes]
    # What the lost node left goes when the next run's preflight comes there.
    run.cluster.on_node(lost, sys.executable, "-c", "from vime.node.scratch import remove_dead; remove_dead()")
    run.nothing_is_left()


def test_the_link_of_a_node_is_cut(run: Scene) -> None:
    run.start_training()
    run.fault("link-down", run.last_node, mend="link-up")
    run.ends("NODE_FAILURE", stage="train", node=run.last_node, within_s=patience.NOTICE, requeued=True)
    run.mend()
    run.goes_on()


def test_slurmd_of_a_node_is_killed(run: Scene) -> None:
    run.start_training()
    run.fault("slurmd-kill", run.last_node, mend="slurmd-start")
    run.ends("NODE_FAILURE", stage="train", node=run.last_node, within_s=patience.NOTICE, requeued=True)
    run.mend()
    run.goes_on()


# -- the run's own processes --


def test_the_controller_is_killed(run: Scene) -> None:
    run.start_training()
    controller = next(event.data["pid"] for event in run.events() if event.kind == "run-start")
    run.on_node(0, "kill", "-9", str(controller))
    run.ends("CODE_ERROR", stage="train", node=0, within_s=patience.NOTICE, text="the controller was killed")


def test_the_driver_raises(run: Scene) -> None:
    run.start_training(then="raise ValueError('rewards have 3 rows, want 4')")
    end = run.ends(
        "CODE_ERROR", stage="train", node=0, within_s=patience.NOTICE, text="ValueError: rewards have 3 rows"
    )
    assert "Traceback" in end.data["log_tail"]


@pytest.mark.parametrize("stage", ["ray-workers", "train"])
def test_a_step_exits_0_too_early(run: Scene, stage: str) -> None:
    """A service that is needed, or training that has not said that it is done."""
    up = "from vime.run.messages import report; import os, time; report('ready'); "
    up += "time.sleep(2 if os.environ['RANK'] == '1' else 600)"
    workers = service("ray-workers", up if stage == "ray-workers" else READY, nodes=range(1, run.nodes))
    run.start(service("ray-head"), workers, run.training("raise SystemExit" if stage == "train" else HANG))
    node = 0 if stage == "train" else 2
    run.ends("CODE_ERROR", stage=stage, node=node, within_s=patience.NOTICE, text="too early")


def test_a_step_takes_more_than_its_memory(run: Scene) -> None:
    take = "import os, time; x = b'1' * (500 * 2**20 if os.environ['RANK'] == '1' else 1); time.sleep(3600)"
    run.start(service("ray-head"), stub("convert", take, nodes=range(run.nodes)), cluster={"mem": "300M"})
    wait_for_event(run.run_dir, "stage-start", patience.JOB, stage="convert")
    run.ends("OUT_OF_MEMORY", stage="convert", node=1, within_s=patience.NOTICE)


def test_a_stage_hangs(run: Scene) -> None:
    hang = f"import os, time; time.sleep(3600 * (os.environ['RANK'] == '{run.last_node}'))"
    run.start(service("ray-head"), stub("convert", hang, nodes=range(run.nodes), deadline_s=patience.MOMENT))
    wait_for_event(run.run_dir, "stage-start", patience.JOB, stage="convert")
    run.ends("DEADLINE", stage="convert", node=run.last_node, within_s=patience.NOTICE, text="have not ended")


# -- Slurm --


SAVES_WHEN_ASKED = """
from vime.run.control import answer_checkpoint, checkpoint_requested
while not checkpoint_requested({run!r}):
    time.sleep(0.1)
answer_checkpoint({run!r}, 1, "iter_1")
"""


def test_the_time_limit_comes_in_the_middle_of_a_rollout(run: Scene) -> None:
    then = SAVES_WHEN_ASKED.format(run=str(run.run_dir))
    begin = time.monotonic()
    run.start_training(then=then, signal_lead_s=120)
    # Less than two minutes are left from now on. Slurm looks at limits every half minute.
    minutes = int(time.monotonic() - begin) // 60 + 2
    slurm.call("scontrol", "update", f"JobId={run.job}", f"TimeLimit={minutes}")
    run.ends("TIME_LIMIT", stage="train", node=None, within_s=patience.NOTICE, text="iter_1", requeued=True)
    slurm.call("scontrol", "update", f"JobId={run.job}", f"TimeLimit={MINUTES}")
    run.goes_on()


def test_the_job_is_preempted(run: Scene) -> None:
    run.start_training()
    slurm.call("scontrol", "requeue", run.job)
    run.ends("PREEMPTED", stage="train", node=None, within_s=patience.NOTICE, requeued=True)
    run.goes_on()


def test_jobs_are_cancelled_in_each_stage(cluster: DevCluster, tmp_path: Path) -> None:
    """Seven runs at once on the same nodes, each in another stage, with processes that detach and are deaf to TERM."""
    stages = ("preflight", "cast", "convert", "ray-head", "ray-workers", "train", "report")
    with contextlib.ExitStack() as opened:
        runs = {stage: opened.enter_context(scene(cluster, tmp_path / stage)) for stage in stages}
        for stage, run in runs.items():
            detached = (
                "import subprocess, sys, time; "
                "deaf = 'import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(3600)'; "
                f"subprocess.Popen(['setsid', '--fork', sys.executable, '-c', deaf, {str(run.run_dir)!r}]); "
                "print('on', flush=True); time.sleep(3600)"
            )
            before = [service("ray-head")] if stage in ("train", "report") else []
            is_service, deadline = stage.startswith("ray"), patience.JOB
            hangs = stub(stage, detached, nodes=range(run.nodes), service=is_service, deadline_s=deadline)
            if stage == "preflight":
                run.start()
                wait_for_event(run.run_dir, "stage-start", patience.JOB, stage=stage)
                slurm.cancel(run.job)
            else:
                run.start(*before, hangs)
        for stage, run in list(runs.items())[1:]:
            wait_until(lambda run=run, stage=stage: run.have_said(stage, "on") == run.nodes, patience.JOB)
            slurm.cancel(run.job)
        for stage, run in runs.items():
            run.ends("CANCELLED", stage=stage, node=None, within_s=patience.NOTICE)


def test_slurms_controller_is_restarted_under_a_running_job(run: Scene) -> None:
    free = run.run_dir / "free"
    wait = f"while not pathlib.Path({str(free)!r}).exists(): time.sleep(0.1)"
    report = stub("report", "print('reported')", needs_services=False)
    run.start(*run.services(), run.training(wait), report)
    run.until_said("train", "training")
    run.cluster.call("restart-controller")
    free.touch()
    assert run.slurm_state(patience.JOB) == "COMPLETED", run.events()[-1]
    assert "reported" in (run.run_dir / "logs/report/node00.log").read_text()
    run.nothing_is_left()


# -- the shared file system --


def test_the_shared_folder_becomes_read_only(cluster: DevCluster, tmp_path: Path) -> None:
    """The journal cannot be written any more: the last word stands in the queue."""
    with scene(cluster, tmp_path / "disk" / "run") as run:
        run.share_disk(run.run_dir.parent, tmp_path / "image")
        run.start_training(then=f"while True: time.sleep(0.2); open({str(run.run_dir / 'step')!r}, 'w').write('1')")
        # As the kernel does when the disk below the file system fails.
        subprocess.run(["mount", "-o", "remount,abort", run.run_dir.parent], check=True, timeout=patience.PROCESS)
        assert run.slurm_state(patience.JOB) == "FAILED"
        job = slurm.job_state(run.job)
        assert job is not None
        assert "vime: STORAGE: train failed on node01" in job.comment
        assert "Read-only file system" in job.comment
        # The accounting hears of the end a little later than the queue.
        wait_until(lambda: "19:0" in slurm.call("sacct", "-nPX", "-j", run.job, "-o", "ExitCode"), patience.SLURM)
        run.nothing_is_left()


def test_a_node_cannot_write_to_the_shared_folder(run_on_small: Scene) -> None:
    run, small = run_on_small, str(STATE / "small")
    run.on_node(run.last_node, "mount", "--bind", small, small, mend=("umount", small))
    run.on_node(run.last_node, "mount", "-o", "remount,ro,bind", small)
    run.start(run.training())
    run.ends("PREFLIGHT", stage="preflight", node=run.last_node, within_s=patience.NOTICE, text="Read-only file system")


def test_the_disk_is_full_while_training_saves(run_on_small: Scene) -> None:
    run = run_on_small
    run.start_training(then="(folder / '.iter_2').write_bytes(bytes(64 * 2**20))")
    run.ends("STORAGE", stage="train", node=0, within_s=patience.NOTICE, text="No space left on device")


# -- preflight --


def too_little_memory(run: Scene, node: int, tmp_path: Path) -> None:
    """The kernel of this node says that 1 GB is available."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    file = tmp_path / "meminfo"
    file.write_text("".join(f"MemAvailable: {10**6} kB\n" if "MemAvail" in line else line + "\n" for line in lines))
    run.on_node(node, "mount", "--bind", str(file), "/proc/meminfo", mend=("umount", "/proc/meminfo"))


def test_a_node_has_too_little_memory(run: Scene, tmp_path: Path) -> None:
    too_little_memory(run, 1, tmp_path)
    run.start(run.training(), host_bytes=2 * 10**9)
    text = "node02: available host memory is 1.0 GB, needs 2.0 GB"
    run.ends("PREFLIGHT", stage="preflight", node=1, within_s=patience.NOTICE, text=text)


def test_a_node_has_too_little_memory_and_a_spare_takes_its_place(run: Scene, tmp_path: Path) -> None:
    too_little_memory(run, 1, tmp_path)
    nodes = run.nodes - 1
    run.start(*run.services(nodes), run.training(""), nodes=nodes, spares=1, host_bytes=2 * 10**9)
    assert run.slurm_state(patience.JOB) == "COMPLETED", run.events()[-1]
    hosts = [node.host for node in read_binding(run.run_dir).nodes]
    assert hosts == [node_name(i) for i in range(run.nodes) if i != 1]
    told = next(event for event in run.events() if event.kind == "preflight")
    assert "left out: node02: available host memory is 1.0 GB, needs 2.0 GB" in told.text
    run.nothing_is_left()


def ring(run: Scene) -> Stage:
    command = ("-m", "vime.node.ring", "--run", str(run.run_dir))
    return Stage(name="ring", nodes=tuple(range(run.nodes)), command=command, tells_end=True, deadline_s=patience.JOB)


@pytest.mark.parametrize(("floor", "slow"), [(0.0001, False), (0.06, True)])
def test_the_network_of_the_nodes_is_measured(run: Scene, floor: float, slow: bool) -> None:
    """A link of 20 Mbit/s to one node, against two floors."""
    run.slow_link(2, "20mbit")
    nodes = run.nodes - 1
    stages = (ring(run), *run.services(nodes), run.training(""))
    run.start(*stages, nodes=nodes, spares=1, cluster={"min_network_gbit": floor})
    assert run.slurm_state(patience.JOB) == "COMPLETED", run.events()[-1]
    hosts = [node.host for node in read_binding(run.run_dir).nodes]
    assert hosts == [node_name(i) for i in range(run.nodes) if i != (2 if slow else run.last_node)]
    told = [event.text for event in run.events() if event.kind == "preflight"][-1]
    assert ("node03: network bandwidth is" in told) is slow
    run.nothing_is_left()


def test_a_port_of_the_plan_is_taken(run: Scene, tmp_path: Path) -> None:
    """By somebody else, before the run comes: it takes another block of ports."""
    probe = make_plan(tmp_path / "probe", [stub("train", "pass")], kind="slurm")
    before = submit(probe)
    wait_for_end(before, patience.SLURM)
    offset = ports.offset_of_job(probe, int(before) + 1)
    run.listen(1, [probe.ports.gcs + offset])
    run.start(*run.services(), run.training(""))
    assert run.job == str(int(before) + 1)
    assert run.slurm_state(patience.JOB) == "COMPLETED", run.events()[-1]
    assert read_binding(run.run_dir).port_offset != offset
    run.nothing_is_left()


def test_a_port_is_taken_after_preflight(run: Scene) -> None:
    free = run.run_dir / "free"
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(free)!r}).exists(): time.sleep(0.1)"
    run.start(stub("convert", wait), *ray_stages(run.run_dir, run.nodes), run.training())
    wait_for_event(run.run_dir, "stage-start", patience.JOB, stage="convert")
    port = read_plan(run.run_dir).ports.gcs + read_binding(run.run_dir).port_offset
    run.listen(0, [port])
    free.touch()
    run.ends("CODE_ERROR", stage="ray-head", node=0, within_s=patience.NOTICE, text=f"port {port} (gcs) is taken")


# -- neighbours --


def test_two_runs_share_their_nodes(run: Scene, tmp_path: Path) -> None:
    """Both with a Ray of their own; the end of one does not touch the other."""
    # All of these nodes of Ray start on the cores of one machine.
    seconds, limit = patience.NOTICE * run.nodes, {"time_limit_minutes": 4 * MINUTES}
    other = tmp_path / "other"
    stages = [preflight(other, run.nodes), *ray_stages(other, run.nodes, seconds), run.training()]
    second = make_plan(other, stages, nodes=run.nodes, kind="slurm", cluster=limit)
    run.start(
        *ray_stages(run.run_dir, run.nodes, seconds), stub("train", READY, deadline_s=patience.JOB), cluster=limit
    )
    job = submit(second)
    wait_for_event(run.run_dir, "stage-start", seconds, stage="train")
    wait_for_event(other, "stage-start", seconds, stage="train")
    one, two = read_binding(run.run_dir), read_binding(other)
    assert [node.host for node in one.nodes] == [node.host for node in two.nodes]
    assert one.port_offset != two.port_offset
    slurm.cancel(job)
    assert wait_for_end(job, patience.JOB) == "CANCELLED"
    time.sleep(3)
    assert read_events(run.run_dir)[-1].kind == "stage-start"
    slurm.cancel(run.job)
    run.ends("CANCELLED", stage="train", node=None, within_s=patience.NOTICE)
    run.cluster.assert_nothing_is_left(job, other)
