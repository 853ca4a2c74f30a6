"""A task: its rank from the plan's places, its environment, its command supervised to the last descendant."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import patience
from tests.support.launch_stub import make_plan, stub
from vime.errors import BadInput
from vime.node.sweep import sweep_stage
from vime.node.task import find_rank, stage_of, task_env
from vime.run.logs import Follower, find_logs, merge
from vime.run.messages import FRAME_CHARACTERS, Assembler, Report, encode
from vime.run.node_local import base_folder
from vime.run.plan import Binding, BoundNode
from vime.system.processes import descendants, start_ticks


@pytest.mark.parametrize(("name", "local", "rank", "node"), [("node03", "0", 0, 2), ("node01", "1", 3, 0)])
def test_rank_follows_the_places_and_not_slurms_numbers(name: str, local: str, rank: int, node: int) -> None:
    stage = stub("convert", "", nodes=(2, 0), tasks_per_node=2)
    environ = {"VIME_PLACES": "2=node03,0=node01", "SLURMD_NODENAME": name, "SLURM_LOCALID": local, "SLURM_NODEID": "7"}
    task = find_rank(stage, environ)
    assert (task.rank, task.node, task.world_size, task.local_rank) == (rank, node, 4, int(local))


def test_a_task_on_a_node_that_the_controller_did_not_name_refuses() -> None:
    environ = {"VIME_PLACES": "0=node01", "SLURMD_NODENAME": "node09", "SLURM_LOCALID": "0"}
    with pytest.raises(BadInput, match="node09"):
        find_rank(stub("cast", ""), environ)


def test_the_command_sees_ranks_and_the_stages_variables_and_nothing_of_slurm(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "", env={"OF_STAGE": "1"})], cluster={"env": {"OF_CLUSTER": "2"}})
    node = BoundNode(index=0, host="a", address="10.0.0.1", interface="ib0")
    environ = {
        "VIME_PLACES": "0=a", "VIME_LOCAL_PLACE": "0", "VIME_LOCAL_RANK": "0", "VIME_JOB": "7", "HOME": "/root",
        "SLURM_PROCID": "3", "SLURM_JOB_ID": "7", "PMI_RANK": "3", "PMIX_RANK": "3", "SRUN_DEBUG": "3",
    }  # fmt: skip
    stage = plan.stages[0]
    env = task_env(plan, stage, find_rank(stage, environ), Binding(nodes=(node,), port_offset=1000), environ)
    assert not [name for name in env if name.startswith(("SLURM", "SRUN", "PMI"))]
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"], env["NODE_RANK"]) == ("0", "1", "0", "0")
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", str(plan.ports.stage_master + 1000))
    assert (env["OF_STAGE"], env["OF_CLUSTER"], env["HOME"], env["VIME_RUN"]) == ("1", "2", "/root", str(run_dir))
    assert (env["GLOO_SOCKET_IFNAME"], env["VLLM_HOST_IP"]) == ("ib0", "10.0.0.1")


def test_caches_of_compiled_kernels_are_on_the_nodes_own_disk_and_outlive_the_job(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "")], cluster={"env": {"VLLM_CACHE_ROOT": "/nvme/vllm"}})
    environ = {"VIME_PLACES": "0=a", "VIME_LOCAL_PLACE": "0", "VIME_LOCAL_RANK": "0", "VIME_JOB": "7"}
    given = {**environ, "HOME": "/home/ada", "CUDA_CACHE_PATH": "/scratch/cuda"}
    env = task_env(plan, plan.stages[0], find_rank(plan.stages[0], environ), None, given)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "FLASHINFER_WORKSPACE_BASE"):
        assert Path(env[name]).parent == base_folder() / "caches", name
        assert not env[name].startswith(env["TMPDIR"]), name
    assert (env["VLLM_CACHE_ROOT"], env["CUDA_CACHE_PATH"]) == ("/nvme/vllm", "/scratch/cuda"), "somebody's own choice"


reports = st.builds(
    Report,
    st.integers(0, 999),
    st.sampled_from(["ready", "result", "exit"]),
    st.dictionaries(st.text(max_size=5), st.text(max_size=3 * FRAME_CHARACTERS), max_size=3),
)


@given(sent=st.lists(reports, max_size=4, unique_by=lambda report: report.rank), data=st.data())
def test_reports_survive_mixing_and_cutting_on_their_way(sent: list[Report], data: st.DataObject) -> None:
    queues = [encode(report).splitlines(keepends=True) for report in sent]
    assert all(len(frame) < 1000 for queue in queues for frame in queue)
    stream = b"srun: note\n"
    while any(queues):
        queue = data.draw(st.sampled_from([queue for queue in queues if queue]))
        stream += queue.pop(0)
    cut = data.draw(st.integers(0, len(stream)))
    assembler = Assembler()
    got = assembler.feed(stream[:cut]) + assembler.feed(stream[cut:])
    assert sorted(got, key=lambda report: report.rank) == sorted(sent, key=lambda report: report.rank)
    assert assembler.other == ["srun: note"]


class Task:
    """A task of a one-stage plan, as the local runner starts it."""

    def __init__(self, run_dir: Path, code: str, **options: Any) -> None:
        make_plan(run_dir, [stub("cast", code, **options)])
        env = {**os.environ, "VIME_PLACES": "0=here", "VIME_LOCAL_PLACE": "0", "VIME_LOCAL_RANK": "0", "VIME_JOB": "t"}
        argv = [sys.executable, "-m", "vime.node.task", "--run", str(run_dir), "--stage", "cast"]
        self.process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE)

    def reports(self) -> list[Report]:
        assert self.process.stdout is not None
        return Assembler().feed(self.process.stdout.read())


def wait_for_log(run_dir: Path, text: str) -> None:
    deadline = time.monotonic() + patience.MOMENT
    while not any(text in line.text for log in find_logs(run_dir) for line in Follower(log).poll()):
        assert time.monotonic() < deadline, f"the log has no {text!r}"
        time.sleep(0.02)


def test_exit_code_and_the_logs_tail_are_reported(run_dir: Path) -> None:
    task = Task(run_dir, "import sys; print('so far so good'); sys.exit('the end')")
    start, end = task.reports()
    assert task.process.wait() == 1
    assert (start.kind, start.data["node"]) == ("start", 0)
    assert (end.kind, end.data["code"], end.data["signal"], end.data["stopped"]) == ("exit", 1, None, False)
    assert end.data["tail"] == ["so far so good", "the end"]
    assert (run_dir / "logs/cast/node00.log").stat().st_mode & 0o777 == 0o600


def test_a_signals_name_is_reported(run_dir: Path) -> None:
    task = Task(run_dir, "import os; os.kill(os.getpid(), 11)")
    assert task.reports()[-1].data["meaning"] == "SIGSEGV"
    assert task.process.wait() == 139


def test_what_the_command_reports_reaches_the_controller(run_dir: Path) -> None:
    task = Task(run_dir, "from vime.run.messages import report; report('ready', text='x' * 5000)")
    ready = [report for report in task.reports() if report.kind == "ready"]
    assert len(ready[0].data["text"]) == 5000


DETACHED = """
import os, subprocess, sys, time
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(3600)"
subprocess.Popen(["setsid", "--fork", sys.executable, "-c", code])
time.sleep({seconds})
"""


def assert_gone(pids: list[int]) -> None:
    assert pids
    deadline = time.monotonic() + patience.MOMENT
    while left := [pid for pid in pids if start_ticks(pid) is not None]:
        assert time.monotonic() < deadline, f"{left} still live"
        time.sleep(0.05)


@pytest.mark.e2e
def test_a_detached_deaf_descendant_ends_with_the_command(run_dir: Path) -> None:
    task = Task(run_dir, DETACHED.format(seconds=1.5))
    wait_for_log(run_dir, "deaf")
    below = descendants(task.process.pid)
    assert task.process.wait(timeout=patience.MOMENT) == 0
    assert_gone(below)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_being_told_to_end_ends_everything_and_says_so(run_dir: Path, number: signal.Signals) -> None:
    task = Task(run_dir, DETACHED.format(seconds=3600))
    wait_for_log(run_dir, "deaf")
    below = descendants(task.process.pid)
    task.process.send_signal(number)
    end = task.reports()[-1]
    assert (end.kind, end.data["stopped"], end.data["meaning"]) == ("exit", True, "SIGTERM")
    assert_gone(below)


@pytest.mark.e2e
def test_the_death_of_its_parent_ends_a_task(run_dir: Path) -> None:
    make_plan(run_dir, [stub("cast", DETACHED.format(seconds=3600))])
    argv = [sys.executable, "-m", "vime.node.task", "--run", str(run_dir), "--stage", "cast"]
    code = f"import subprocess, time; subprocess.Popen({json.dumps(argv)}); time.sleep(3600)"
    env = {**os.environ, "VIME_PLACES": "0=here", "VIME_LOCAL_PLACE": "0", "VIME_LOCAL_RANK": "0"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL)
    wait_for_log(run_dir, "deaf")
    below = descendants(parent.pid)
    parent.kill()
    parent.wait()
    assert_gone(below)


def test_logs_of_several_nodes_merge_by_time(run_dir: Path) -> None:
    folder = run_dir / "logs" / "train"
    folder.mkdir(parents=True)
    (folder / "node00.log").write_text("2026-01-01 10:00:00.000 a\n  more of a\n2026-01-01 10:00:02.000 c\n")
    (folder / "node01.log").write_text("2026-01-01 10:00:01.000 b\n2026-01-01 10:00:03.000 torn")
    logs = find_logs(run_dir)
    assert [log.label for log in logs] == ["train/node00", "train/node01"]
    lines = merge(line for log in logs for line in Follower(log).poll())
    assert [line.text for line in lines] == ["a", "  more of a", "b", "c"]
    assert find_logs(run_dir, node=1) == logs[1:]
    assert find_logs(run_dir, stage="cast") == []


def test_a_task_knows_the_sweep_which_is_in_no_plan(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "pass")])
    assert stage_of(plan, "sweep") == sweep_stage(tuple(node.index for node in plan.nodes))
    assert stage_of(plan, "train").name == "train"
    with pytest.raises(BadInput, match="no stage 'bogus'"):
        stage_of(plan, "bogus")
