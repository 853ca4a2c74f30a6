"""Why training ended: the driver's account of an error and of what Ray knows."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError

from vime.errors import BadInput, Cause, Crash, DeadlineExceeded, VimeError
from vime.run.plan import BoundNode
from vime.train.causes import DeadActor, NodeLost, RayFacts, cause_of, explain, line_of, one_line

NODE = BoundNode(index=1, host="gpu007.example.org", address="10.0.0.7")
KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: RankActor
\tactor_id: 5c6f
\tpid: 420
\tname: rank-1
\tnamespace: vime
\tip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by SIGKILL by OOM killer due to high memory usage; (2) ray stop --force is called."""
NODE_DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: RankActor
The actor died because its node has died. Node Id: 44ab the actor's node was terminated unexpectedly: health check \
failed due to missing too many heartbeats
The actor never ran - it was cancelled before it started running."""
PEER = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:3021"


def through_ray(error: Exception) -> BaseException:
    """The exception of a remote call: one of a class made of Ray's and of the error's own."""
    return RayTaskError("f", "traceback", error).as_instanceof_cause()


def died(text: str) -> RayActorError:
    """Ray's error with this text, which it makes in C++."""
    error = ActorDiedError()
    error.error_msg = text
    return error


def engine_lost(inner: Exception) -> Exception:
    error = VimeError("engine 1 failed 4 times")
    error.__cause__ = inner
    return error


RANK = DeadActor("rank 1", 1, 1, "Worker unexpectedly exits with a connection error code 2.")
HUNGRY = DeadActor("EngineActor", 0, None, "killed by the memory monitor", out_of_memory=True)
LOST = RayFacts({1: "node 1 (gpu007) was lost: its raylet does not answer (connection refused)"})
NOTHING = RayFacts()


@pytest.mark.parametrize(
    ("error", "facts", "cause", "nodes", "rank"),
    [
        # A lost node explains everything else.
        (died("The actor never ran"), LOST, Cause.NODE_FAILURE, (1,), None),
        (through_ray(RuntimeError(PEER)), LOST, Cause.NODE_FAILURE, (1,), None),
        (ExceptionGroup("tasks", [NodeLost(NODE, "no heartbeat")]), NOTHING, Cause.NODE_FAILURE, (1,), None),
        (ExceptionGroup("tasks", [died(KILLED), NodeLost(NODE, "gone")]), NOTHING, Cause.NODE_FAILURE, (1,), None),
        (engine_lost(through_ray(NodeLost(NODE, "gone"))), NOTHING, Cause.NODE_FAILURE, (1,), None),
        (died(NODE_DIED), NOTHING, Cause.NODE_FAILURE, (), None),
        # An actor that died explains errors of its neighbours, and no error of a program.
        (died(KILLED), RayFacts(dead=(RANK,)), Cause.CRASH, (1,), 1),
        (through_ray(RuntimeError(PEER)), RayFacts(dead=(RANK,)), Cause.CRASH, (1,), 1),
        (ActorUnavailableError("connection broken", None), RayFacts(dead=(RANK,)), Cause.CRASH, (1,), 1),
        (DeadlineExceeded("trainer train did not end"), RayFacts(dead=(RANK,)), Cause.CRASH, (1,), 1),
        (through_ray(RuntimeError(PEER)), RayFacts(dead=(RANK, HUNGRY)), Cause.OUT_OF_MEMORY, (0,), None),
        (through_ray(ValueError("loss has 3 rows")), RayFacts(dead=(RANK,)), Cause.CODE_ERROR, (), None),
        (through_ray(BadInput("no such file")), RayFacts(dead=(RANK,)), Cause.BAD_INPUT, (), None),
        # Without facts, the error's own class and text.
        (died(KILLED), NOTHING, Cause.CRASH, (), None),
        (through_ray(RuntimeError(PEER)), NOTHING, Cause.CRASH, (), None),
        (through_ray(DeadlineExceeded("late")), NOTHING, Cause.DEADLINE, (), None),
        (through_ray(BadInput("wrong")), NOTHING, Cause.BAD_INPUT, (), None),
        (through_ray(OSError(28, "No space left on device")), NOTHING, Cause.STORAGE, (), None),
        (through_ray(RuntimeError("CUDA error: uncorrectable ECC error")), NOTHING, Cause.NODE_FAILURE, (), None),
        (through_ray(RuntimeError("CUDA out of memory. Tried 3 GiB")), NOTHING, Cause.OUT_OF_MEMORY, (), None),
        (ExceptionGroup("tasks", [through_ray(DeadlineExceeded("late"))]), NOTHING, Cause.DEADLINE, (), None),
        # Of several errors, the one that is no consequence.
        (ExceptionGroup("tasks", [RuntimeError(PEER), BadInput("wrong")]), NOTHING, Cause.BAD_INPUT, (), None),
        (ExceptionGroup("tasks", [died(KILLED), ValueError("x")]), NOTHING, Cause.CODE_ERROR, (), None),
        (BaseExceptionGroup("t", [asyncio.CancelledError(), Crash("raylet")]), NOTHING, Cause.CRASH, (), None),
        (through_ray(ValueError("broken")), NOTHING, Cause.CODE_ERROR, (), None),
    ],
)
def test_the_account_of_an_error(
    error: BaseException, facts: RayFacts, cause: Cause, nodes: tuple[int, ...], rank: int | None
) -> None:
    account = explain(error, facts)
    assert (account.cause, account.nodes, account.rank) == (cause, nodes, rank), account
    assert account.text
    assert "\n" not in account.text


def test_the_error_that_ray_made_of_one_of_ours_keeps_its_cause() -> None:
    assert cause_of(through_ray(DeadlineExceeded("late"))) is Cause.DEADLINE
    assert cause_of(died(NODE_DIED)) is Cause.NODE_FAILURE


def test_rays_words_on_a_death_fit_on_a_line() -> None:
    assert one_line(KILLED) == "Worker unexpectedly exits with a connection error code 2. End of file."
    assert one_line(NODE_DIED).endswith("health check failed due to missing too many heartbeats")


def test_the_line_of_an_error_names_its_class_and_is_no_joint_of_a_traceback() -> None:
    joint = "The above exception was the direct cause of the following exception:"
    assert line_of(RuntimeError(f"CUDA error: misaligned address\n{joint}")).endswith("misaligned address")
    assert line_of(ValueError()) == "ValueError"
    assert line_of(BadInput("wrong flag")) == "wrong flag"
    assert explain(through_ray(ValueError("3 rows")), NOTHING).text == "ValueError: 3 rows"
