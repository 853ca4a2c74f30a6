"""The one cause and the one culprit of a stage that failed, from facts and from texts as srun and Slurm print them."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import patience
from vime.errors import Cause
from vime.launch.allocation import known_as
from vime.launch.failure import Account, Facts, Failure, TaskExit, decide, facts_of, may_repeat
from vime.launch.steps import AllocatedNode, Step
from vime.run.messages import Report
from vime.run.plan import Artefact, Stage
from vime.slurm.reach import parse_places

PLACES = (AllocatedNode(0, "gpu006"), AllocatedNode(1, "gpu007"))
PEER = ("RuntimeError: Connection closed by peer [10.0.0.7]:3021",)
TRACE = ("Traceback (most recent call last):", '  File "a.py", line 1, in f', "ValueError: loss has 3 rows")
DRIVER = TaskExit("gpu006", 0, 12, meaning="exit code 12", tail=("error: training ended: node_failure: no actor",))
RAYLET = Failure(Cause.CRASH, "ray-workers failed on gpu007 (rank 0): raylet ended", "ray-workers", "gpu007", 0)
LOST = {"gpu007": "does not answer (connection refused)"}
FAULTY = {"gpu007": "GPU 3: uncorrectable ECC errors"}


def killed(tail: tuple[str, ...] = ()) -> TaskExit:
    return TaskExit("gpu007", 1, 137, signal.SIGKILL, "SIGKILL", tail)


def failed(code: int, *tail: str) -> TaskExit:
    return TaskExit("gpu007", 1, code, None, f"exit code {code}", tail)


def account(cause: Cause, *nodes: str, rank: int | None = None) -> Account:
    return Account(cause, "as the driver says", nodes, rank)


FACTS = [
    # A node that is lost, whatever else is said. The driver's healthy node is not blamed.
    (Facts("train", lost=LOST, exits=(DRIVER,)), Cause.NODE_FAILURE, "gpu007"),
    (Facts("train", lost=LOST, account=account(Cause.CODE_ERROR), exits=(failed(1),)), Cause.NODE_FAILURE, "gpu007"),
    (Facts("train", lost=LOST, service=RAYLET), Cause.NODE_FAILURE, "gpu007"),
    (Facts("train", lost=LOST, late=Failure(Cause.DEADLINE, "late")), Cause.NODE_FAILURE, "gpu007"),
    (Facts("ray-workers", lost=LOST, unmet="the service ended too early"), Cause.NODE_FAILURE, "gpu007"),
    # Of two, the one that the driver blames too.
    (
        Facts("train", lost={"gpu005": "is down", **LOST}, account=account(Cause.NODE_FAILURE, "gpu007")),
        Cause.NODE_FAILURE,
        "gpu007",
    ),
    (Facts("train", faulty=FAULTY, account=account(Cause.CRASH, "gpu006", rank=0)), Cause.NODE_FAILURE, "gpu007"),
    # A service that died under the stage explains what the driver saw.
    (Facts("train", service=RAYLET, account=account(Cause.NODE_FAILURE, "gpu007")), Cause.CRASH, "gpu007"),
    # Ray's facts, through the driver, before its exit code.
    (Facts("train", account=account(Cause.NODE_FAILURE, "gpu007"), exits=(DRIVER,)), Cause.NODE_FAILURE, "gpu007"),
    (Facts("train", account=account(Cause.CRASH, "gpu007", rank=1), exits=(DRIVER,)), Cause.CRASH, "gpu007"),
    (Facts("train", account=account(Cause.DATA_ERROR), exits=(DRIVER,)), Cause.DATA_ERROR, "gpu006"),
    # Exit codes and signals of tasks.
    (Facts("train", exits=(DRIVER,)), Cause.NODE_FAILURE, "gpu006"),
    (Facts("convert", exits=(failed(2, "error: no such folder"),)), Cause.BAD_INPUT, "gpu007"),
    (Facts("convert", exits=(failed(1, *TRACE),)), Cause.CODE_ERROR, "gpu007"),
    (Facts("convert", exits=(killed(),)), Cause.CRASH, "gpu007"),
    (Facts("convert", exits=(TaskExit("gpu007", 1, 139, signal.SIGSEGV, "SIGSEGV"),)), Cause.CRASH, "gpu007"),
    (Facts("convert", exits=(TaskExit("gpu007", 1, 143, signal.SIGTERM, "SIGTERM"),)), Cause.CODE_ERROR, "gpu007"),
    # Texts, where a program did not say its cause.
    (Facts("convert", exits=(failed(1, "OSError: [Errno 28] No space left on device"),)), Cause.STORAGE, "gpu007"),
    (Facts("convert", exits=(failed(1, *PEER),)), Cause.CRASH, "gpu007"),
    (Facts("convert", exits=(failed(1, "CUDA out of memory. Tried to allocate"),)), Cause.OUT_OF_MEMORY, "gpu007"),
    (Facts("convert", exits=(failed(1, "CUDA error: uncorrectable ECC error"),)), Cause.NODE_FAILURE, "gpu007"),
]


@pytest.mark.parametrize(("facts", "cause", "node"), FACTS)
def test_cause_and_culprit_of_facts(facts: Facts, cause: Cause, node: str | None) -> None:
    failure = decide(facts)
    assert (failure.cause, failure.node) == (cause, node), failure
    assert "\n" not in failure.text


SRUN = [
    # (what srun and slurmstepd wrote, srun's exit code, cause, node), in the words of Slurm 20.11 to 23.11
    ("srun: error: Node failure on gpu007\nsrun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
     143, Cause.NODE_FAILURE, "gpu007"),
    ("srun: error: Node failure on gpu007", 0, Cause.NODE_FAILURE, "gpu007"),
    ("slurmstepd: error: *** STEP 12.3 ON gpu006 CANCELLED AT 2026-03-01T00:10:00 DUE TO NODE FAILURE, SEE SLURMCTLD "
     "LOG FOR DETAILS ***", 143, Cause.NODE_FAILURE, None),
    ("srun: error: Task launch for StepId=12.3 failed on node gpu007: Communication connection failure\n"
     "srun: error: Application launch failed: Communication connection failure", 1, Cause.NODE_FAILURE, "gpu007"),
    ("srun: error: gpu007: task 1: Node Failure", 1, Cause.NODE_FAILURE, "gpu007"),
    ("srun: error: Task launch for StepId=12.3 failed on node gpu007: Job credential revoked", 1, Cause.NODE_FAILURE,
     "gpu007"),
    ("slurmstepd-gpu007: error: StepId=12.3 exceeded memory limit (512345 > 307200), being killed\n"
     "slurmstepd-gpu007: error: Exceeded job memory limit\nsrun: error: gpu007: task 1: Killed", 137,
     Cause.OUT_OF_MEMORY, "gpu007"),
    ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.3. Some of your processes may have been killed by "
     "the cgroup out-of-memory handler.\nsrun: error: gpu007: task 1: Out Of Memory", 137, Cause.OUT_OF_MEMORY,
     "gpu007"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=12.3. Some of the step tasks have been OOM Killed.\n"
     "srun: error: gpu007: task 1: Out Of Memory", 1, Cause.OUT_OF_MEMORY, "gpu007"),
    ("srun: error: gpu007: task 3: Killed\nsrun: Terminating StepId=12.3\nsrun: error: gpu006: task 2: Terminated", 143,
     Cause.CRASH, "gpu007"),
    ("srun: error: gpu007: task 1: Exited with exit code 19\nsrun: Terminating StepId=12.3", 19, Cause.STORAGE,
     "gpu007"),
    ("srun: error: gpu007: tasks 8-15: Exited with exit code 1\nsrun: launch/slurm: _step_signal: Terminating "
     "StepId=12.3", 1, Cause.CODE_ERROR, "gpu007"),
    ("srun: error: Unable to create step for job 12: Invalid generic resource (gres) specification", 1,
     Cause.CODE_ERROR, None),
    ("/bin/sh: line 1: python9: command not found", 127, Cause.CODE_ERROR, None),
    ("", 7, Cause.CODE_ERROR, None),
]  # fmt: skip


def ended_step(tmp_path: Path, said: str, *reports: Report, service: bool = False) -> Step:
    log = tmp_path / "launcher.log"
    log.write_text(said)
    process = subprocess.Popen(["true"], stdout=subprocess.PIPE)
    stage = Stage(name="convert", command=("-m", "x"), nodes=(0, 1), service=service, deadline_s=patience.PROCESS)
    step = Step(stage, PLACES, [process], log, reports=list(reports))
    step.wait(patience.MOMENT)
    step.close()
    return step


@pytest.mark.parametrize(("said", "code", "cause", "node"), SRUN)
def test_cause_and_culprit_of_what_srun_says(
    tmp_path: Path, said: str, code: int, cause: Cause, node: str | None
) -> None:
    failure = decide(facts_of(ended_step(tmp_path, said, service=True), code))
    assert (failure.cause, failure.node) == (cause, node), failure


def test_who_took_too_much_memory_is_in_slurms_words_not_in_the_first_report() -> None:
    """Slurm kills all tasks of the step, and their reports come in any order."""
    said = (
        "slurmstepd-gpu007: error: StepId=12.3 exceeded memory limit (571404288 > 314572800), being killed",
        "slurmstepd-gpu006: error: *** STEP 12.3 ON gpu006 CANCELLED AT 2026-11-27T18:19:45 ***",
        "srun: error: gpu007: task 1: Killed",
        "srun: error: gpu006: task 0: Killed",
    )
    healthy = TaskExit("gpu006", 0, 137, signal.SIGKILL, "SIGKILL", ())
    guilty = TaskExit("gpu007", 1, 137, signal.SIGKILL, "SIGKILL", ("loading",))
    for exits, rank in (((healthy,), None), ((healthy, guilty), 1), ((guilty, healthy), 1)):
        failure = decide(Facts("convert", exits=exits, said=said, exit_code=137))
        assert (failure.cause, failure.node, failure.rank) == (Cause.OUT_OF_MEMORY, "gpu007", rank)
    unnamed = ("slurmstepd: error: Detected 1 oom_kill event in StepId=12.3. Some of the tasks have been OOM Killed.",)
    failure = decide(Facts("convert", exits=(guilty, healthy), said=unnamed, exit_code=137))
    assert (failure.cause, failure.node, failure.rank) == (Cause.OUT_OF_MEMORY, "gpu007", 1)


KILLED = "srun: error: gpu007: task 1: Killed\nsrun: Terminating StepId=12.3"
TOO_LARGE = "slurmstepd-gpu007: error: StepId=12.3 exceeded memory limit (5718 > 3146), being killed\n" + KILLED
NO_STEP = "srun: error: Unable to create step for job 12: Socket timed out on send/recv operation"


@pytest.mark.parametrize(
    ("said", "stage", "repeats"),
    [
        (KILLED, {}, True),
        (NO_STEP, {}, True),
        (NO_STEP, {"service": True}, True),
        (KILLED, {"service": True}, True),
        (KILLED, {"outputs": (Artefact(name="bf16", kind="hf", path="/b/bf16"),)}, False),
        (TOO_LARGE, {}, False),
        ("srun: error: gpu007: task 1: Exited with exit code 1", {}, False),
    ],
)
def test_a_step_without_outputs_repeats_after_a_kill_from_outside(
    tmp_path: Path, said: str, stage: dict, repeats: bool
) -> None:
    step = ended_step(tmp_path, said)
    step.stage = step.stage.model_copy(update=stage)
    assert may_repeat(step) is repeats


def exit_report(rank: int, code: int, *, stopped: bool = False) -> Report:
    host = "gpu007.example.org"
    data = {"node": 1, "host": host, "code": code, "signal": None, "stopped": stopped, "meaning": "exit", "tail": ["x"]}
    return Report(rank, "exit", data)


def test_a_task_is_named_by_slurms_name_of_its_node_whatever_the_host_calls_itself(tmp_path: Path) -> None:
    failure = decide(facts_of(ended_step(tmp_path, "", exit_report(0, 1, stopped=True), exit_report(1, 3)), 3))
    assert (failure.node, failure.rank) == ("gpu007", 1)


def test_a_service_that_ends_well_while_it_is_needed_ended_too_early(tmp_path: Path) -> None:
    failure = decide(facts_of(ended_step(tmp_path, "", exit_report(1, 0), service=True)))
    assert (failure.cause, failure.node) == (Cause.CODE_ERROR, "gpu007")
    assert "the service ended too early" in failure.text


def test_the_drivers_account_names_logical_nodes(tmp_path: Path) -> None:
    told = Report(0, "failure", {"cause": "CRASH", "text": "rank 1 died", "nodes": [1], "rank": 1})
    failure = decide(facts_of(ended_step(tmp_path, "", told, exit_report(0, 20)), 20, ("gpu006", "gpu007")))
    assert (failure.cause, failure.node, failure.rank) == (Cause.CRASH, "gpu007", 1)


@pytest.mark.parametrize(
    ("node", "name"),
    [
        ("gpu007", "gpu007"),
        ("gpu007.example.org", "gpu007"),
        ("gpu008.example.org", "gpu008.cluster"),
        ("gpu008", "gpu008.cluster"),
        ("gpu009.example.org", "gpu009.example.org"),
    ],
)
def test_a_host_has_the_name_that_slurm_gives_its_node(node: str, name: str) -> None:
    assert known_as(node, ("gpu006", "gpu007", "gpu008.cluster")) == name


def test_where_slurmd_of_each_node_listens() -> None:
    text = (
        "NodeName=gpu006 Arch=x86_64 NodeAddr=10.0.0.6 NodeHostName=gpu006 Version=22.05.8 State=ALLOCATED\n"
        "NodeName=gpu007 NodeAddr=10.0.0.7 NodeHostName=gpu007 Port=17007 Version=23.11.1 State=DOWN* Reason=x [a@b]\n"
    )
    assert parse_places(text, default_port=6818) == {"gpu006": ("10.0.0.6", 6818), "gpu007": ("10.0.0.7", 17007)}
