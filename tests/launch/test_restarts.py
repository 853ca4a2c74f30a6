"""Decisions after a failed attempt, without any process: nodes that are left out, and who starts the run again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.launch_stub import make_plan, preflight, service, stub
from vime.errors import Cause
from vime.launch.allocation import Allocation
from vime.launch.failure import Failure
from vime.launch.restarts import Restarts
from vime.launch.signals import Signals
from vime.run.folder import make_run_folder
from vime.run.journal import Journal
from vime.run.plan import Plan
from vime.schedulers.runner_local import LocalRunner

NEED, SPARES = 3, 2
NODES = tuple(f"gpu{number:03d}" for number in range(NEED + SPARES))


class Nodes(LocalRunner):
    """A job of five nodes, of which Slurm has lost some."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.can_requeue = True
        self.lost: Collection[str] = ()
        self.requeued = 0

    def nodes(self) -> tuple[str, ...]:
        return NODES

    def lost_nodes(self) -> dict[str, str]:
        return dict.fromkeys(sorted(self.lost), "is down for Slurm")

    def requeue(self) -> None:
        self.requeued += 1


class Start:
    """One start of a run, from its first failure on."""

    def __init__(self, run_dir: Path) -> None:
        stages = [preflight(run_dir, NEED), service("ray-head"), stub("train", "", nodes=range(NEED))]
        plan = make_plan(make_run_folder(run_dir), stages, nodes=NEED, spares=SPARES)
        self.stages, self.runner, self.events = plan.stages, Nodes(plan), []
        self.allocation = Allocation(plan, self.runner, event=self.event, say=print)
        self.restarts = Restarts(plan, self.runner, self.allocation, Signals(), event=self.event, say=print)
        self.restarts.begin()

    def event(self, kind: str, text: str = "", **fields: Any) -> None:
        self.events.append((kind, text, fields))

    def fails(self, cause: Cause, node: str | None, lost: Collection[str] = (), *, during: str = "train") -> bool:
        """The attempt has come to this stage and fails; whether another one follows in the allocation."""
        for stage in self.stages:
            self.restarts.started(stage)
            if stage.name == during:
                break
        self.runner.lost = lost
        if again := self.restarts.recovers(Failure(cause, f"{during} failed", during, node)):
            self.restarts.begin()
        return again

    def ends(self, cause: Cause) -> bool:
        """The start ends; whether the job was requeued."""
        self.restarts.finish(Failure(cause, "it failed", "train"))
        return bool(self.runner.requeued)

    @property
    def left(self) -> list[str]:
        """Nodes that the next preflight looks at."""
        return [place.name for place in self.allocation.places(self.stages[0])]

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.events]


def names(numbers: str) -> list[str]:
    return [NODES[int(number)] for number in numbers]


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        pytest.param([("1", "1", "train")], "0234", id="one node"),
        pytest.param([("1", "", "train")], "0234", id="a GPU, of which Slurm knows nothing"),
        pytest.param([("1", "12", "train")], "034", id="two at once"),
        pytest.param([("1", "14", "train")], "023", id="a node and a spare at once"),
        pytest.param([("1", "1", "train"), ("2", "12", "preflight")], "034", id="two, the second noticed by preflight"),
        pytest.param([("1", "1", "train"), ("3", "13", "ray-head")], "024", id="the spare during the recovery"),
        pytest.param([("1", "1", "train"), ("2", "2", "train")], "034", id="one after the other, the first up again"),
        pytest.param([("1", "1", "train"), ("4", "14", "preflight")], "023", id="an unused spare during the recovery"),
    ],
)
def test_the_attempt_after_a_loss_has_the_nodes_that_are_left(tmp_path, losses, left):
    start = Start(tmp_path / "run")
    for node, lost, during in losses:
        assert start.fails(Cause.NODE_FAILURE, NODES[int(node)], names(lost), during=during)
    assert start.left == names(left)
    assert start.kinds == ["run-end", "recovery"] * len(losses)
    ends = [fields for kind, _, fields in start.events if kind == "run-end"]
    assert [end["node"] for end in ends] == [NODES[int(node)] for node, _, _ in losses]
    assert all(end["data"]["requeued"] for end in ends)


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([("1", "123", "train")], id="more at once than there are spares"),
        pytest.param([("1", "1", "train"), ("2", "123", "preflight")], id="two more during the recovery"),
        pytest.param([("1", "12", "train"), ("3", "123", "train")], id="one more after the last spare"),
    ],
)
def test_a_loss_that_leaves_too_few_nodes_is_requeued(tmp_path, losses):
    start = Start(tmp_path / "run")
    *before, (node, lost, during) = losses
    assert all(start.fails(Cause.NODE_FAILURE, NODES[int(one)], names(out), during=at) for one, out, at in before)
    assert not start.fails(Cause.NODE_FAILURE, NODES[int(node)], names(lost), during=during)
    assert start.ends(Cause.NODE_FAILURE)
    assert start.kinds == ["run-end", "recovery"] * len(before) + ["requeue", "run-end"]


@pytest.mark.parametrize(
    ("cause", "during", "requeued"),
    [
        # Before training runs again, what ends the recovery may be the fault's aftermath on these nodes.
        (Cause.CODE_ERROR, "ray-head", True),
        (Cause.DEADLINE, "ray-head", True),
        (Cause.PREFLIGHT, "preflight", True),
        (Cause.CRASH, "ray-head", True),
        (Cause.CANCELLED, "ray-head", False),
        # Afterwards it says what it says at any time.
        (Cause.CODE_ERROR, "train", False),
        (Cause.CRASH, "train", False),
    ],
)
def test_what_ends_a_recovery_itself_starts_the_job_again(tmp_path, cause, during, requeued):
    start = Start(tmp_path / "run")
    assert start.fails(Cause.NODE_FAILURE, NODES[1], [NODES[1]])
    assert not start.fails(cause, NODES[2], [NODES[1]], during=during)
    assert start.ends(cause) is requeued


@pytest.mark.parametrize("cause", [cause for cause in Cause if not cause.requeue_mends])
def test_a_cause_that_other_nodes_do_not_mend_is_no_reason_to_recover(tmp_path, cause):
    assert not Start(tmp_path / "run").fails(cause, NODES[1], [NODES[1]])


def test_a_job_that_slurm_is_about_to_end_does_not_recover(tmp_path):
    start = Start(tmp_path / "run")
    start.restarts.hurried = True
    assert not start.fails(Cause.NODE_FAILURE, NODES[1], [NODES[1]])


@pytest.mark.parametrize(("last", "node"), [("", NODES[0]), ("stopped", None)])
def test_the_controllers_host_is_blamed_unless_it_was_ending_its_stages(tmp_path, last, node):
    """Slurm ends the job of a lost node, and may kill the controller before it has written its last word."""
    start = Start(tmp_path / "run")
    journal = Journal(tmp_path / "run")
    journal.write("run-start", data={"job": "7", "restart": 0, "host": NODES[0]})
    journal.write("stage-start", stage="train")
    if last:
        journal.write("stage-end", last, stage="train")
    journal.close()
    start.runner.why_lost = lambda job, restart: Cause.NODE_FAILURE
    start.restarts.tell_of_lost_start()
    ((kind, text, fields),) = start.events
    assert (kind, fields["node"], fields["data"]["cause"]) == ("run-end", node, "NODE_FAILURE")
    assert "left no last word: node failure" in text


LOSSES = st.lists(st.tuples(st.integers(0, NEED - 1), st.sets(st.sampled_from(NODES))), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(LOSSES)
def test_a_node_that_was_left_out_never_comes_back_and_enough_are_left(tmp_path_factory, losses):
    start = Start(tmp_path_factory.mktemp("run"))
    out: set[str] = set()
    for number, lost in losses:
        node = start.left[number]
        out |= {node, *lost}
        again = start.fails(Cause.NODE_FAILURE, node, lost)
        assert again is (len(NODES) - len(out) >= NEED)
        if not again:
            break
        assert start.left == [name for name in NODES if name not in out]
