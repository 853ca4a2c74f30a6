"""The controller on this machine, with real tasks and stub stages: order, services, gates, and every way a run ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.launch_stub import folder, make_plan, preflight, service, stub, write_code
from vime.errors import Cause
from vime.launch import controller
from vime.launch.controller import Controller
from vime.node.network import ALONE_ADDRESS
from vime.run import tokens as run_tokens
from vime.run.control import answer_checkpoint, request_checkpoint
from vime.run.folder import make_run_folder, read_binding
from vime.run.journal import Event, Journal, last_start, read_events
from vime.run.plan import Artefact, Plan, Stage
from vime.schedulers.runner_local import LocalRunner
from vime.system.processes import descendants


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    before = descendants(os.getpid())
    yield
    assert set(descendants(os.getpid())) <= set(before)


def run(plan: Plan) -> Cause:
    return Controller(plan, LocalRunner(plan), say=lambda line: None).run()


def run_stages(run_dir: Path, *stages: Stage, nodes: int = 1) -> Cause:
    return run(make_plan(run_dir, [preflight(run_dir, nodes), *stages], nodes=nodes))


def journal(run_dir: Path) -> list[tuple[str, str | None]]:
    return [(event.kind, event.stage) for event in last_start(read_events(run_dir))]


def last(run_dir: Path) -> Event:
    return read_events(run_dir)[-1]


def test_a_run_goes_through_its_stages_in_order_and_keeps_services_up(run_dir: Path, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    up = f"import pathlib, time; p = pathlib.Path({str(alive)!r}); p.touch(); from vime.run.messages import report; "
    up += "report('ready'); time.sleep(3600)"
    check = f"import pathlib, os; assert pathlib.Path({str(alive)!r}).exists(); print('rank', os.environ['RANK'])"
    both = stub("convert", check, nodes=(0, 1), tasks_per_node=2)
    assert run_stages(run_dir, service("ray-head", up), both, stub("train", check), nodes=2) is Cause.SUCCESS
    assert journal(run_dir) == [
        ("run-start", None),
        ("stage-start", "preflight"), ("preflight", "preflight"), ("binding", None), ("stage-end", "preflight"),
        ("stage-start", "ray-head"), ("stage-ready", "ray-head"),
        ("stage-start", "convert"), ("stage-end", "convert"),
        ("stage-start", "train"), ("stage-end", "train"),
        ("stage-end", "ray-head"),
        ("run-end", None),
    ]  # fmt: skip
    said = sorted(path.read_text().split()[-1] for path in (run_dir / "logs/convert").glob("node*.log"))
    assert said == ["0", "1", "2", "3"]
    assert (run_dir / "logs" / "current.log").resolve() == (run_dir / "logs/train/node00.log").resolve()
    binding = read_binding(run_dir)
    assert [(node.index, node.address) for node in binding.nodes] == [(0, ALONE_ADDRESS), (1, ALONE_ADDRESS)]


def test_services_stop_before_a_stage_that_does_not_need_them(run_dir: Path) -> None:
    report = stub("report", "pass", needs_services=False)
    assert run_stages(run_dir, service("ray-head"), stub("train", "pass"), report) is Cause.SUCCESS
    told = journal(run_dir)
    assert told.index(("stage-end", "ray-head")) < told.index(("stage-start", "report"))


def test_private_files_are_private_and_new_at_every_start(run_dir: Path) -> None:
    tokens = []
    for _ in range(2):
        assert run_stages(run_dir) is Cause.SUCCESS
        tokens.append(run_tokens.read_token(run_dir, "ray_token"))
    assert tokens[0] != tokens[1]
    assert (run_dir / "secrets").stat().st_mode & 0o777 == 0o700
    for name in run_tokens.TOKENS:
        assert run_tokens.token_path(run_dir, name).stat().st_mode & 0o777 == 0o600
    token = tokens[1]
    for path in run_dir.rglob("*"):
        if path.is_file() and path.parent.name != "secrets":
            assert token not in path.read_text(errors="replace"), path


@pytest.mark.e2e
def test_the_first_failure_ends_the_run_and_names_stage_node_rank_cause_and_log(run_dir: Path) -> None:
    code = "import os, time; time.sleep(0 if os.environ['RANK'] == '1' else 60); raise ValueError('shard 3 is missing')"
    stages = (service("ray-head"), stub("convert", code, nodes=(0, 1)), stub("train", "print('never')"))
    assert run_stages(run_dir, *stages, nodes=2) is Cause.CODE_ERROR
    end = last(run_dir)
    assert (end.kind, end.stage, end.rank, end.data["cause"]) == ("run-end", "convert", 1, "CODE_ERROR")
    assert end.node is not None
    assert "ValueError: shard 3 is missing" in end.text
    assert "Traceback" in end.data["log_tail"]
    assert ("stage-start", "train") not in journal(run_dir)


@pytest.mark.parametrize("cause", [Cause.BAD_INPUT, Cause.DATA_ERROR, Cause.OUT_OF_MEMORY])
def test_a_stage_that_exits_with_its_cause_passes_it_on(run_dir: Path, cause: Cause) -> None:
    plan = make_plan(run_dir, [stub("train", f"import sys; sys.exit({int(cause)})")])
    assert run(plan) is cause


def test_training_may_take_the_time_that_its_job_was_given_beyond_the_plan(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalRunner, "end_time", lambda runner: time.time() + 3600)
    plan = make_plan(run_dir, [stub("train", "import time; time.sleep(3)", deadline_s=0.5)])
    assert run(plan) is Cause.DEADLINE
    whole = plan.model_copy(update={"cluster": plan.cluster.model_copy(update={"time_limit_minutes": 0})})
    assert run(whole) is Cause.SUCCESS


def test_a_stage_that_hangs_ends_at_its_deadline(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("cast", "import time; print('reading'); time.sleep(3600)", deadline_s=1.5)])
    begin = time.monotonic()
    assert run(plan) is Cause.DEADLINE
    assert time.monotonic() - begin < patience.MOMENT
    assert "not done after 2 s: ranks [0]" in last(run_dir).text


def test_a_service_that_is_not_ready_says_what_is_missing(run_dir: Path) -> None:
    code = "from vime.run.messages import report; import time; report('waiting', missing=['node07']); time.sleep(3600)"
    plan = make_plan(run_dir, [service("ray-workers", code, deadline_s=patience.STUB)])
    assert run(plan) is Cause.DEADLINE
    assert "missing: node07" in last(run_dir).text


@pytest.mark.parametrize(("code", "cause"), [(0, Cause.CODE_ERROR), (12, Cause.NODE_FAILURE)])
def test_a_service_that_dies_ends_the_run_whatever_its_code(run_dir: Path, code: int, cause: Cause) -> None:
    up = f"from vime.run.messages import report; import sys, time; report('ready'); time.sleep(0.7); sys.exit({code})"
    plan = make_plan(run_dir, [service("ray-head", up), stub("train", "import time; time.sleep(3600)")])
    assert run(plan) is cause
    assert last(run_dir).stage == "ray-head"


def test_a_failure_under_a_dying_service_is_blamed_on_the_service(run_dir: Path) -> None:
    up = "from vime.run.messages import report; import sys, time; report('ready'); time.sleep(1.2); sys.exit('lost')"
    plan = make_plan(run_dir, [service("ray-head", up), stub("train", "import time; time.sleep(0.7); raise OSError")])
    run(plan)
    assert (last(run_dir).stage, ": lost" in last(run_dir).text) == ("ray-head", True)


def test_a_service_is_blamed_that_tells_of_its_failure_and_takes_long_to_end(run_dir: Path) -> None:
    up = "from vime.run.messages import report; import sys, time; report('ready'); time.sleep(1.0); "
    up += "report('failure', cause='CRASH', text='gcs_server ended', nodes=[0], rank=0); time.sleep(30)"
    train = stub("train", "import time; time.sleep(1.5); raise SystemExit(1)")
    plan = make_plan(run_dir, [preflight(run_dir, 1), service("ray-head", up), train])
    assert run(plan) is Cause.CRASH
    end = last(run_dir)
    assert (end.stage, end.rank) == ("ray-head", 0)
    assert "gcs_server ended" in end.text


# -- gates --


def gated_plan(run_dir: Path, tmp_path: Path, text: str = "weights") -> Plan:
    source = tmp_path / "fp8"
    source.mkdir(exist_ok=True)
    (source / "shard").write_text("bytes") if not (source / "shard").exists() else None
    output = tmp_path / "bf16"
    cast = stub("cast", write_code(output, text), inputs=(folder("in", source),), outputs=(folder("out", output),))
    return make_plan(run_dir, [cast])


def test_a_stage_is_skipped_when_its_outputs_verify(tmp_path: Path) -> None:
    assert run(gated_plan(tmp_path / "first", tmp_path)) is Cause.SUCCESS
    assert run(gated_plan(tmp_path / "second", tmp_path)) is Cause.SUCCESS
    assert ("stage-skip", "cast") in journal(tmp_path / "second")


@pytest.mark.parametrize("change", ["input", "output", "command", "killed"])
def test_outputs_that_do_not_verify_are_made_again_and_the_old_ones_kept_aside(tmp_path: Path, change: str) -> None:
    run(gated_plan(tmp_path / "first", tmp_path))
    if change == "input":
        (tmp_path / "fp8" / "shard").write_text("other bytes")
    elif change == "output":
        (tmp_path / "bf16" / "model").write_text("cut")
    elif change == "killed":
        (tmp_path / "bf16" / ".vime-artefact.json").unlink()
        (tmp_path / ".bf16.vime-stage.json").write_text("{}")
    text = "other weights" if change == "command" else "weights"
    assert run(gated_plan(tmp_path / "second", tmp_path, text)) is Cause.SUCCESS
    assert (tmp_path / "bf16" / "model").read_text() == text
    assert len(list(tmp_path.glob("bf16.stale-*"))) == 1


def test_a_folder_that_vime_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "mine").write_text("by hand")
    assert run(gated_plan(tmp_path / "run", tmp_path)) is Cause.CODE_ERROR
    assert (tmp_path / "bf16" / "mine").read_text() == "by hand"
    assert "FileExistsError" in last(tmp_path / "run").text


def test_a_stage_without_its_output_has_failed(run_dir: Path, tmp_path: Path) -> None:
    plan = make_plan(run_dir, [stub("cast", "pass", outputs=(folder("out", tmp_path / "bf16"),))])
    assert run(plan) is Cause.CODE_ERROR
    assert "ended too early, without its output" in last(run_dir).text


# -- signals --


def when_running(run_dir: Path, stage: str, act: Callable[[], None]) -> threading.Thread:
    """Acts as soon as the stage has started and said something."""

    def wait() -> None:
        deadline = time.monotonic() + patience.MOMENT
        while time.monotonic() < deadline:
            if (run_dir / "logs" / stage / "node00.log").exists():
                act()
                return
            time.sleep(0.02)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_terminated_run_is_cancelled_and_leaves_nothing(run_dir: Path) -> None:
    plan = make_plan(run_dir, [service("ray-head"), stub("train", "import time; print('on'); time.sleep(3600)")])
    when_running(run_dir, "train", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(plan) is Cause.CANCELLED
    assert (last(run_dir).kind, last(run_dir).stage, last(run_dir).data["cause"]) == ("run-end", "train", "CANCELLED")


TRAINING = """
import pathlib, time
from vime.run.control import answer_checkpoint, checkpoint_requested
run = {run!r}
print("training", flush=True)
while not checkpoint_requested(run):
    time.sleep(0.05)
{answer}
"""


def test_a_warning_makes_training_save_before_the_run_stops(run_dir: Path) -> None:
    code = TRAINING.format(run=str(run_dir), answer="answer_checkpoint(run, 7, 'iter_7')")
    plan = make_plan(run_dir, [stub("train", code)], signal_lead_s=60)
    when_running(run_dir, "train", lambda: os.kill(os.getpid(), signal.SIGUSR2))
    assert run(plan) is Cause.PREEMPTED
    events = {event.kind: event for event in read_events(run_dir)}
    assert json.loads(events["checkpoint"].text)["rollout_id"] == 7
    assert "iter_7" in events["run-end"].text
    assert events["run-end"].data["requeued"] is False


class EndsIn28Seconds(LocalRunner):
    """A machine that is given up, as an allocation is."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._end = time.time() + 28

    def end_time(self) -> float:
        return self._end


@pytest.mark.e2e
def test_training_that_does_not_save_in_time_is_stopped_all_the_same(run_dir: Path) -> None:
    code = TRAINING.format(run=str(run_dir), answer="time.sleep(3600)")
    plan = make_plan(run_dir, [stub("train", code)], signal_lead_s=26)
    begin = time.monotonic()
    assert Controller(plan, EndsIn28Seconds(plan), say=lambda line: None).run() is Cause.TIME_LIMIT
    assert time.monotonic() - begin < 20
    assert "none was written in time" in [event.text for event in read_events(run_dir)]


def test_an_answer_of_an_earlier_start_does_not_count(run_dir: Path) -> None:
    count = f"import pathlib, sys; sys.exit(len(list(pathlib.Path({str(run_dir)!r}, 'control').glob('checkpoint*'))))"
    plan = make_plan(run_dir, [stub("train", count)])
    (run_dir / "control").mkdir()
    request_checkpoint(run_dir)
    answer_checkpoint(run_dir, 7, "iter_7")
    assert run(plan) is Cause.SUCCESS


@pytest.mark.e2e
def test_a_killed_controller_takes_its_stages_with_it(run_dir: Path) -> None:
    make_plan(run_dir, [service("ray-head"), stub("train", "import time; print('on', flush=True); time.sleep(3600)")])
    code = "import sys; from vime.schedulers import local; from vime.run.folder import read_plan; "
    code += "local.run(read_plan(sys.argv[1]))"
    controller = subprocess.Popen([sys.executable, "-c", code, str(run_dir)], stdout=subprocess.DEVNULL)
    below: list[int] = []
    when_running(run_dir, "train", lambda: below.extend(descendants(controller.pid))).join()
    controller.kill()
    controller.wait()
    deadline = time.monotonic() + patience.MOMENT
    while any(Path("/proc", str(pid)).exists() for pid in below):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(below) >= 4
    end = last(run_dir)
    assert (end.kind, end.stage, end.data["cause"]) == ("run-end", "train", "CODE_ERROR")
    assert "the controller was killed" in end.text


@pytest.mark.parametrize("stops", [True, False])
def test_a_driver_that_stops_answering_ends_the_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    monkeypatch.setattr(controller, "DRIVER_SILENCE_S", 2.0)
    code = "from vime.run.messages import report; import os, signal, time\n"
    code += "for beat in range(8): report('alive'); time.sleep(0.5)\n"
    code += "os.kill(os.getpid(), signal.SIGSTOP)" if stops else "report('result')"
    plan = make_plan(run_dir, [stub("train", code, tells_end=True)])
    assert run(plan) is (Cause.CRASH if stops else Cause.SUCCESS)
    assert ("the driver has not answered for 2 s" in last(run_dir).text) is stops


# -- who is to blame, and who owns the folder --


class Cluster(LocalRunner):
    """This machine under a name that Slurm gives it, with one more node that is lost."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.can_requeue = True
        self.asked: list[str] = []

    def nodes(self) -> tuple[str, ...]:
        return ("gpu006", "gpu007")

    def lost_nodes(self) -> dict[str, str]:
        return {"gpu007": "does not answer (connection refused)"}

    def requeue(self) -> None:
        pass

    def exclude(self, nodes: Sequence[str]) -> None:
        self.asked.extend(nodes)


def test_the_lost_node_is_blamed_and_left_out_by_the_name_that_slurm_knows(run_dir: Path) -> None:
    code = "import sys; print('error: training ended: code_error: The actor never ran'); sys.exit(1)"
    plan = make_plan(run_dir, [stub("train", code, tells_end=True)], nodes=2)
    journal = Journal(make_run_folder(run_dir))
    journal.write("run-end", "earlier", node="gpu007.example.org", data={"cause": "NODE_FAILURE", "requeued": True})
    journal.close()
    runner = Cluster(plan)
    assert Controller(plan, runner, say=lambda line: None).run() is Cause.NODE_FAILURE
    end = next(event for event in reversed(read_events(run_dir)) if event.kind == "run-end")
    assert (end.node, end.data["requeued"]) == ("gpu007", True)
    assert runner.asked == ["gpu007"]


CRASHES = """
import os, pathlib, signal
tracker = pathlib.Path({folder!r}) / "latest_checkpointed_iteration.txt"
if tracker.exists():
    raise SystemExit
if {saves!r}:
    tracker.parent.mkdir()
    tracker.write_text("3")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("saves", [True, False])
def test_a_crash_is_followed_by_another_attempt_only_after_a_checkpoint(
    run_dir: Path, tmp_path: Path, saves: bool
) -> None:
    folder = tmp_path / "checkpoints"
    outputs = (Artefact(name="checkpoints", path=str(folder), kind="run"),)
    plan = make_plan(run_dir, [stub("train", CRASHES.format(folder=str(folder), saves=saves), outputs=outputs)])
    runner = Cluster(plan)
    runner.lost_nodes = dict
    assert Controller(plan, runner, say=lambda line: None).run() is (Cause.SUCCESS if saves else Cause.CRASH)
    events = read_events(run_dir)
    assert [event.data.get("attempt", 0) for event in events if event.kind == "run-start"] == [0, 1][: 1 + saves]
    first = next(event for event in events if event.kind == "run-end")
    assert (first.data["cause"], first.data["requeued"]) == ("CRASH", saves)


FAILS_ONCE = """
import pathlib, sys
first = pathlib.Path({marker!r})
if not first.exists():
    first.touch()
    sys.exit(1)
"""


@pytest.mark.parametrize("spares", [1, 0])
def test_a_spare_takes_the_place_of_a_lost_node(run_dir: Path, tmp_path: Path, spares: int) -> None:
    train = stub("train", FAILS_ONCE.format(marker=str(tmp_path / "failed")), nodes=(1,), tells_end=False)
    plan = make_plan(run_dir, [preflight(run_dir, 2), stub("rehearsal", ""), train], nodes=2, spares=spares)
    runner = Cluster(plan)
    runner.nodes = lambda: ("gpu006", "gpu007", "gpu008")[: 2 + spares]
    runner.lost_nodes = lambda: {"gpu007": "is DOWN for Slurm"} if (tmp_path / "failed").exists() else {}
    cause = Controller(plan, runner, say=lambda line: None).run()
    events = read_events(run_dir)
    end = next(event for event in events if event.kind == "run-end")
    assert (end.data["cause"], end.node, end.data["requeued"]) == ("NODE_FAILURE", "gpu007", True)
    starts = [event.data["nodes"] for event in events if (event.kind, event.stage) == ("stage-start", "train")]
    if spares:
        assert cause is Cause.SUCCESS
        assert starts == [["gpu007"], ["gpu008"]]
        assert "without gpu007" in next(event.text for event in events if event.kind == "recovery")
        assert [node.slurm_index for node in read_binding(run_dir).nodes] == [0, 2]
        rehearsals = [event.kind for event in events if event.stage == "rehearsal"]
        assert rehearsals == ["stage-start", "stage-end", "stage-skip"]
    else:
        assert cause is Cause.NODE_FAILURE
        assert "requeued by vime" in end.text
        assert starts == [["gpu007"]]


def test_a_recovery_that_fails_before_training_is_requeued(run_dir: Path, tmp_path: Path) -> None:
    marker = tmp_path / "failed"
    bad = stub("ray-head", f"import pathlib; assert not pathlib.Path({str(marker)!r}).exists()")
    train = stub("train", FAILS_ONCE.format(marker=str(marker)))
    plan = make_plan(run_dir, [preflight(run_dir, 2), bad, train], nodes=2, spares=1)
    runner = Cluster(plan)
    runner.nodes = lambda: ("gpu006", "gpu007", "gpu008")
    runner.lost_nodes = lambda: {"gpu007": "is DOWN for Slurm"} if marker.exists() else {}
    assert Controller(plan, runner, say=lambda line: None).run() is Cause.CODE_ERROR
    assert "requeued by vime" in last(run_dir).text


def test_a_second_controller_of_a_run_folder_is_refused(run_dir: Path) -> None:
    plan = make_plan(run_dir, [stub("train", "import time; print('on', flush=True); time.sleep(3600)")])
    refused: list[Cause] = []

    def second() -> None:
        before = (run_dir / "events.jsonl").read_bytes(), (run_dir / "owner.json").read_bytes()
        code = "import sys; from vime.schedulers import local; from vime.run.folder import read_plan; "
        code += "sys.exit(local.run(read_plan(sys.argv[1])))"
        done = subprocess.run(
            [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, timeout=patience.PROCESS
        )
        refused.append(Cause(done.returncode))
        assert "in use by start 0 of job local-" in done.stdout
        assert before == ((run_dir / "events.jsonl").read_bytes(), (run_dir / "owner.json").read_bytes())
        os.kill(os.getpid(), signal.SIGTERM)

    when_running(run_dir, "train", second)
    assert run(plan) is Cause.CANCELLED
    assert refused == [Cause.BAD_INPUT]
    assert not (run_dir / "owner.json").exists()


NVIDIA_SMI = """#!/bin/sh
# Stands for nvidia-smi of a node with one GPU: no machine of the tests has one that can be broken on request.
cat <<'XML'
<nvidia_smi_log><driver_version>580.1</driver_version><gpu id="00000000:9D:00.0">
<product_name>NVIDIA H100 80GB HBM3</product_name><gpu_recovery_action>{action}</gpu_recovery_action>
<ecc_errors><volatile><dram_uncorrectable>{errors}</dram_uncorrectable></volatile></ecc_errors>
</gpu></nvidia_smi_log>
XML
"""


@pytest.mark.parametrize(("action", "errors", "cause"), [("None", 0, "CODE_ERROR"), ("GPU Reset", 2, "NODE_FAILURE")])
def test_gpus_are_looked_at_after_training_failed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, errors: int, cause: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(action=action, errors=errors))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    code = "raise RuntimeError('CUDA error: an illegal memory access was encountered')"
    gpus = {"gpu_request": "gpus-per-node", "gpus_per_node": 1}
    run(make_plan(run_dir, [stub("train", code)], cluster=gpus))
    end = last(run_dir)
    assert (end.data["cause"], end.stage) == (cause, "train")
    assert ("has a broken GPU: GPU 0 (00000000:9D:00.0)" in end.text) is (errors > 0)
    assert ("stage-end", "post-mortem") in journal(run_dir)
