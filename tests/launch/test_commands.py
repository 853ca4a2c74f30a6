"""vime.status, vime.logs and vime.cancel on the folders of local runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import make_plan, service, stub
from vime import cancel, logs, status
from vime.run.jobs import Job, write_jobs
from vime.run.journal import Journal, last_start, read_events
from vime.run.logs import tail_offset
from vime.run.registry import record_run
from vime.run.state import current_job, run_state
from vime.slurm import queue as slurm
from vime.system.processes import descendants


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def running(run_dir: Path):
    """A local run in its training stage."""
    train = stub("train", "print('rollout 1', flush=True); import time; time.sleep(3600)")
    make_plan(run_dir, [service("ray-head"), train])
    record_run(run_dir)
    code = "import sys; from vime.schedulers import local; from vime.run.folder import read_plan; "
    code += "sys.exit(local.run(read_plan(sys.argv[1])))"
    controller = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=subprocess.DEVNULL)
    log, deadline = run_dir / "logs/train/node00.log", time.monotonic() + patience.PROCESS
    while not (log.exists() and "rollout 1" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield controller
    controller.kill()
    controller.wait()


@pytest.mark.e2e
def test_a_run_is_seen_followed_and_cancelled(
    running: subprocess.Popen[bytes], run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main(["--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert (seen["run"], seen["state"], seen["stage"]) == (run_dir.name, "running", "train")
    assert {stage["name"]: stage["state"] for stage in seen["stages"]} == {"ray-head": "ready", "train": "running"}

    follower = threading.Thread(target=logs.main, args=(["-f"],))
    follower.start()
    below = descendants(running.pid)
    assert cancel.main([]) == 0
    follower.join(timeout=patience.PROCESS)
    assert not follower.is_alive()
    said = capsys.readouterr().out
    assert "train/node00 rollout 1" in said
    assert "controller run-end train train was ended by SIGTERM: cancelled" in said
    assert running.wait(timeout=patience.MOMENT) == 15
    assert not [pid for pid in below if Path("/proc", str(pid)).exists()]

    assert status.main([str(run_dir)]) == 0
    assert ": cancelled" in capsys.readouterr().out
    assert cancel.main([]) == 0
    assert "nothing to cancel" in capsys.readouterr().out


@pytest.mark.e2e
def test_a_run_whose_machine_died_is_lost(running: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Nobody is left to write a last word: the witness that would write a killed controller's has died too."""
    below = descendants(running.pid)
    for pid in below:
        os.kill(pid, signal.SIGSTOP)
    running.kill()
    running.wait()
    for pid in below:
        os.kill(pid, signal.SIGKILL)
    assert run_state(run_dir).state == "lost"


def test_progress_and_the_next_checkpoint_are_told(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "")])
    recipe = plan.recipe.model_copy(
        update={
            "rollout": plan.recipe.rollout.model_copy(update={"num_rollout": 40}),
            "checkpoint": plan.recipe.checkpoint.model_copy(update={"save_interval": 10}),
        }
    )
    (run_dir / "plan.json").write_text(plan.model_copy(update={"recipe": recipe}).model_dump_json())
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 9, "time": 1, "rollout/raw_reward": 0.5}) + "\n")
    state = run_state(run_dir)
    assert (state.state, state.rollout, state.num_rollout, state.reward) == ("planned", 10, 40, 0.5)
    assert state.next_checkpoint == 19
    assert "rollout 10 of 40: reward 0.5" in status.render(state)


def test_the_state_is_that_of_the_last_start(run_dir: Path) -> None:
    make_plan(run_dir, [stub("cast", ""), stub("train", "")])
    journal = Journal(run_dir)
    for kind, stage, data in (
        ("run-start", None, {"restart": 0}), ("stage-start", "cast", {}), ("stage-end", "cast", {"seconds": 4.0}),
        ("run-end", "train", {"cause": "TIME_LIMIT", "requeued": True}),
        ("run-start", None, {"restart": 1}), ("stage-skip", "cast", {}), ("stage-start", "train", {}),
        ("run-end", "train", {"cause": "DATA_ERROR"}),
    ):  # fmt: skip
        journal.write(kind, stage=stage, data=data)  # pyright: ignore[reportArgumentType]
    journal.close()
    state = run_state(run_dir)
    assert (state.state, state.cause, state.restart) == ("failed", "DATA_ERROR", 1)
    assert [(stage.name, stage.state) for stage in state.stages] == [("cast", "skipped"), ("train", "failed")]
    assert len(read_events(run_dir)) == 8


def write_events(run_dir: Path, *events: tuple[str, str | None, dict]) -> None:
    journal = Journal(run_dir)
    for kind, stage, data in events:
        journal.write(kind, stage=stage, data=data)  # pyright: ignore[reportArgumentType]
    journal.close()


CHAIN = [Job("7", "convert"), Job("8", "train"), Job("9", "report")]
CONVERTED = [
    ("run-start", None, {"job": "7", "link": "convert", "link_index": 0}), ("stage-end", "convert", {"seconds": 4.0}),
    ("job-end", None, {}),
]  # fmt: skip
TRAINS = [
    ("run-start", None, {"job": "8", "link": "train", "link_index": 1, "restart": 1}),
    ("stage-start", "train", {}),
]


@pytest.mark.parametrize(
    ("events", "job"),
    [
        ([], "7"),
        (CONVERTED[:2], "7"),
        (CONVERTED, "8"),
        (CONVERTED + TRAINS, "8"),
        (CONVERTED + TRAINS + TRAINS + [("job-end", None, {})], "9"),
        # The chain is submitted anew: what the jobs of before did is of no account.
        (CONVERTED + TRAINS + CONVERTED[:1], "7"),
    ],
)
def test_the_job_that_runs_or_comes_next_is_told_from_the_journal(events: list, job: str, run_dir: Path) -> None:
    run_dir.mkdir()
    write_events(run_dir, *events)
    found = current_job(CHAIN, last_start(read_events(run_dir)))
    assert found is not None
    assert found.job_id == job


@pytest.fixture(params=["no tools", "tools that fail"])
def without_slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where Slurm cannot be asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if request.param == "tools that fail":
        for name in ("scontrol", "sacct", "squeue"):
            (folder / name).write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin")
        return
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (CONVERTED, "pending"),
        (CONVERTED + TRAINS, "running"),
        ([*CONVERTED, *TRAINS, ("run-end", "train", {"cause": "PREEMPTED", "requeued": True})], "requeued"),
        ([*CONVERTED, *TRAINS, ("run-end", "train", {"cause": "CODE_ERROR"})], "failed"),
        ([*CONVERTED, *TRAINS, ("run-end", None, {"cause": "SUCCESS"})], "succeeded"),
    ],
)
def test_where_slurm_does_not_answer_the_journal_tells_the_state(
    without_slurm: None, events: list, state: str, run_dir: Path
) -> None:
    make_plan(run_dir, [stub("convert", ""), stub("train", ""), stub("report", "")], kind="slurm", shape="chain")
    write_jobs(run_dir, CHAIN)
    write_events(run_dir, *events)
    found = run_state(run_dir)
    assert found.state == state
    assert bool(found.note) == (state not in ("failed", "succeeded"))
    assert {stage.name: stage.state for stage in found.stages}["convert"] == "done"
    assert found.run in status.render(found)


def test_a_run_that_is_submitted_again_waits_whatever_became_of_it_before(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(run_dir, [stub("train", "")], kind="slurm")
    write_events(run_dir, *TRAINS, ("run-end", "train", {"cause": "CANCELLED"}))
    write_jobs(run_dir, [Job("8")])
    monkeypatch.setattr(slurm, "query_job", lambda job, seconds: slurm.JobState(job, "PENDING", reason="Priority"))
    assert run_state(run_dir).state == "cancelled"
    write_jobs(run_dir, [Job("12")])
    found = run_state(run_dir)
    assert (found.state, found.job, found.reason) == ("pending", "12", "Priority")
    assert [stage.state for stage in found.stages] == ["waiting"]


@pytest.mark.parametrize(
    ("jobs", "queue", "events", "state", "reason"),
    [
        (CHAIN, "PENDING", CONVERTED, "pending", "Dependency"),
        (CHAIN, "CANCELLED", CONVERTED, "cancelled", "the job is CANCELLED, and it never started"),
        (CHAIN, "CANCELLED", [], "cancelled", "the job is CANCELLED, and it never started"),
        (CHAIN[:1], "COMPLETED", CONVERTED, "pending", "the next job of the chain has not started"),
        (CHAIN, "PENDING", CONVERTED + TRAINS, "requeued", "Dependency"),
        (CHAIN, "RUNNING", CONVERTED + TRAINS, "running", ""),
        (CHAIN, "NODE_FAIL", CONVERTED + TRAINS, "lost", "the job is NODE_FAIL and its controller left no last word"),
        (
            CHAIN,
            None,
            CONVERTED + TRAINS,
            "lost",
            "the scheduler does not know the job, and its controller left no last word",
        ),
    ],
)
def test_the_queue_and_the_journal_together_tell_the_state(
    jobs: list[Job], queue: str | None, events: list, state: str, reason: str, run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_plan(run_dir, [stub("convert", ""), stub("train", ""), stub("report", "")], kind="slurm", shape="chain")
    write_jobs(run_dir, jobs)
    write_events(run_dir, *events)
    known = None if queue is None else slurm.JobState("8", queue, reason="Dependency")
    monkeypatch.setattr(slurm, "query_job", lambda job, seconds: known)
    found = run_state(run_dir)
    assert (found.state, found.reason) == (state, reason)


def test_nothing_is_cancelled_where_slurm_does_not_answer(
    without_slurm: None, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_plan(run_dir, [stub("train", "")], kind="slurm")
    write_jobs(run_dir, [Job("8")])
    write_events(run_dir, *TRAINS)
    assert cancel.main([str(run_dir)]) != 0
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", [status.main, logs.main, cancel.main])
def test_a_run_that_is_not_there_is_bad_input(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["no-such-run"]) == 2
    assert capsys.readouterr().err.startswith("error: no run 'no-such-run'")


def test_a_stage_that_is_not_there_is_bad_input(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_plan(run_dir, [stub("train", "")])
    assert logs.main([str(run_dir), "--stage", "trian"]) == 2
    assert "controller, train" in capsys.readouterr().err


def write_log(run_dir: Path, name: str, *lines: str) -> None:
    path = run_dir / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def logged(run_dir: Path) -> Path:
    """Logs of a conversion with two ranks a node, of Ray on two nodes, of an engine, and of training."""
    stages = [
        stub("convert", "", nodes=(0, 1), tasks_per_node=2),
        service("ray-head"),
        service("ray-workers", nodes=(1,)),
        stub("train", ""),
    ]
    make_plan(run_dir, stages, nodes=2)
    day = f"{time.localtime().tm_year}-01-02"
    for node in range(2):
        for rank in (2 * node, 2 * node + 1):
            write_log(run_dir, f"convert/node0{node}.rank{rank}.log", f"{day} 10:00:0{rank}.000 shard {rank}")
    write_log(run_dir, "ray-head/node00.log", f"{day} 10:00:05.000 head")
    write_log(run_dir, "ray-workers/node01.log", f"{day} 10:00:06.000 worker")
    engine = "(EngineCore pid=5) INFO 01-02 10:00:08 [core.py:1] engine is up"
    write_log(run_dir, "engines/engine-1-node01.log", "Triton is missing", engine, "  more")
    actor = "(rank 3 on node 1 pid=77, ip=10.0.0.2)"
    write_log(
        run_dir, "train/node00.log", f"{day} 10:00:07.000 driver", f"{day} 10:00:09.000 {actor} loss 0.5",
        f"{day} 10:00:10.000 {actor}", f"{day} 10:00:11.000 (rank 0 on node 0 pid=76) loss 0.4",
    )  # fmt: skip
    return run_dir


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stage", "convert", "--node", "1"], ["shard 2", "shard 3"]),
        (["--stage", "convert", "--rank", "1"], ["shard 1"]),
        (["--stage", "train"], ["driver", "loss 0.5", "", "loss 0.4"]),
        (["--stage", "train", "--rank", "3"], ["loss 0.5", ""]),
        (["--stage", "train", "--node", "0"], ["driver", "loss 0.4"]),
        (["--rank", "0"], ["shard 0", "head", "worker", "loss 0.4"]),
        (["--node", "1"], ["shard 2", "shard 3", "worker", "Triton is missing", "[core.py:1] engine is up", "more",
                           "loss 0.5", ""]),
        (["--stage", "engines", "--rank", "1"], ["Triton is missing", "[core.py:1] engine is up", "more"]),
    ],
)  # fmt: skip
def test_logs_are_chosen_by_stage_node_and_rank_in_the_order_of_time(
    words: list[str], said: list[str], logged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert logs.main([str(logged), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(said)
    for line, text in zip(lines, said, strict=True):
        assert line.rstrip().endswith(text)
    times = [line[:12] for line in lines]
    assert times == sorted(times)


def test_a_line_of_a_trainer_rank_is_marked_as_its_own(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.main([str(logged), "--stage", "train", "--rank", "3", "-n", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "10:00:09.000 train/node01.rank3 loss 0.5"


@pytest.mark.parametrize("lines", [0, 1, 2, 1000, 30_000, 70_000])
@pytest.mark.parametrize("end", [b"\n", b" torn"])
def test_the_end_of_a_log_is_found_without_reading_it_whole(lines: int, end: bytes, tmp_path: Path) -> None:
    text = b"".join(b"line %d\n" % number for number in range(60_000)) + b"last" + end
    (tmp_path / "log").write_bytes(text)
    whole = text[: text.rindex(b"\n") + 1].splitlines(keepends=True)
    got = text[tail_offset(tmp_path / "log", lines) :]
    assert got[: got.rindex(b"\n") + 1 if b"\n" in got else 0] == b"".join(whole[len(whole) - min(lines, len(whole)) :])


def test_the_last_lines_are_those_of_the_whole(logged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert logs.main([str(logged)]) == 0
    everything = capsys.readouterr().out.splitlines()
    for count in (1, 3, 7, 100):
        assert logs.main([str(logged), "-n", str(count)]) == 0
        assert capsys.readouterr().out.splitlines() == everything[-count:]
