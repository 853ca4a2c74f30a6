"""A recovery that keeps what serves: the controller on this machine, with real tasks and stub stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.launch_stub import make_plan, preflight, service, stub
from vime.errors import Cause
from vime.launch.controller import Controller
from vime.run.folder import read_binding
from vime.run.journal import Event, read_events
from vime.run.plan import Artefact, Plan, Stage
from vime.run.tokens import RAY_TOKEN, read_token
from vime.schedulers.runner_local import LocalRunner

NODES = ("gpu006", "gpu007", "gpu008", "gpu009")
SERVES = """
import os, pathlib, time
from vime.run.messages import report
with pathlib.Path({folder!r}, "served").open("a") as file:
    file.write(os.environ["VIME_NODE"])
report("ready")
time.sleep(3600)
"""
TRAINS = """
import os, pathlib, signal, sys
folder = pathlib.Path({folder!r})
tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
attempt = len(list(folder.glob("attempt-*")))
(folder / f"attempt-{{attempt}}").touch()
end = {ends!r}[attempt]
if "saves" in end:
    tracker.parent.mkdir(exist_ok=True)
    tracker.write_text(str(attempt))
if "crashes" in end:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit("fails" in end)
"""


class Cluster(LocalRunner):
    """This machine as a job of three nodes and a spare, some of which Slurm loses once training has begun."""

    def __init__(self, plan: Plan, folder: Path, lost: Sequence[str]) -> None:
        super().__init__(plan)
        self.can_requeue = True
        self._folder, self._lost = folder, lost

    def nodes(self) -> tuple[str, ...]:
        return NODES

    def lost_nodes(self) -> dict[str, str]:
        return dict.fromkeys(self._lost if (self._folder / "attempt-0").exists() else (), "is DOWN for Slurm")

    def requeue(self) -> None:
        """Nothing follows here."""


def run(run_dir: Path, folder: Path, *ends: str, lost: Sequence[str] = ()) -> tuple[Cause, list[Event], list[str]]:
    """Cause and events of a run whose training ends so in each attempt, and the starts of services, as their nodes."""
    serves = SERVES.format(folder=str(folder))
    train = stub(
        "train",
        TRAINS.format(folder=str(folder), ends=ends),
        outputs=(Artefact(name="checkpoints", path=str(folder / "checkpoints"), kind="run"),),
    )
    stages: list[Stage] = [
        preflight(run_dir, 3),
        stub("rehearsal", ""),
        service("ray-head", serves),
        service("ray-workers", serves, nodes=(1, 2)),
        train,
    ]
    plan = make_plan(run_dir, stages, nodes=3, spares=1)
    cause = Controller(plan, Cluster(plan, folder, lost), say=lambda line: None).run()
    return cause, read_events(run_dir), sorted((folder / "served").read_text())


def recovery(events: Sequence[Event]) -> list[bool]:
    """True for each recovery that kept the cluster."""
    return [event.data["kept"] for event in events if event.kind == "recovery"]


def test_a_crash_of_training_leaves_the_services_running(run_dir: Path, tmp_path: Path) -> None:
    cause, events, served = run(run_dir, tmp_path, "saves, crashes", "ends")
    assert cause is Cause.SUCCESS
    assert recovery(events) == [True]
    assert served == ["0", "1", "2"]
    skipped = [event.stage for event in events if event.kind == "stage-skip"]
    assert skipped == ["preflight", "rehearsal", "ray-head", "ray-workers"]
    assert [event.stage for event in events if event.text == "stopped"] == ["train", "ray-workers", "ray-head"]


def test_a_spare_joins_the_services_that_run(run_dir: Path, tmp_path: Path) -> None:
    cause, events, served = run(run_dir, tmp_path, "saves, crashes", "ends", lost=["gpu007"])
    assert cause is Cause.SUCCESS
    assert recovery(events) == [True]
    assert served == ["0", "1", "1", "2"]
    binding = read_binding(run_dir)
    assert [node.slurm_index for node in binding.nodes] == [0, 3, 2]
    assert binding.version == 2
    starts = [(event.stage, event.data["nodes"]) for event in events if event.kind == "stage-start"]
    assert starts[4:] == [
        ("train", ["gpu006"]),
        ("preflight", ["gpu009"]),
        ("ray-workers", ["gpu009"]),
        ("train", ["gpu006"]),
    ]


def test_the_secrets_of_a_kept_cluster_stay(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    started = LocalRunner.start

    def start(self: LocalRunner, stage: Stage, places: Sequence) -> object:
        found.extend([read_token(run_dir, RAY_TOKEN)] if stage.name == "train" else [])
        return started(self, stage, tuple(places))

    monkeypatch.setattr(LocalRunner, "start", start)
    run(run_dir, tmp_path, "saves, crashes", "ends")
    assert len(found) == 2
    assert len(set(found)) == 1


@pytest.mark.parametrize("again", ["crashes", "fails"])
def test_an_attempt_that_fails_at_once_in_a_kept_cluster_is_followed_by_a_new_one(
    run_dir: Path, tmp_path: Path, again: str
) -> None:
    cause, events, served = run(run_dir, tmp_path, "saves, crashes", again, "ends")
    assert cause is Cause.SUCCESS
    assert recovery(events) == [True, False]
    assert served == ["0", "0", "1", "1", "2", "2"]


def test_the_host_of_the_head_takes_the_cluster_along(run_dir: Path, tmp_path: Path) -> None:
    cause, events, served = run(run_dir, tmp_path, "saves, crashes", "ends", lost=["gpu006"])
    assert cause is Cause.SUCCESS
    assert recovery(events) == [False]
    assert served == ["0", "0", "1", "1", "2", "2"]


def test_a_failure_that_another_attempt_does_not_mend_ends_the_services(run_dir: Path, tmp_path: Path) -> None:
    cause, events, served = run(run_dir, tmp_path, "saves, fails")
    assert cause is Cause.CODE_ERROR
    assert (recovery(events), served) == ([], ["0", "1", "2"])
    assert events[-1].kind == "run-end"
    assert "ray-head" in [event.stage for event in events if event.text == "stopped"]


def test_a_node_that_is_lost_as_its_service_starts_is_noticed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vime.launch.controller.LOOK_S", 0.5)
    (tmp_path / "attempt-0").touch()
    stages = [preflight(run_dir, 3), service("ray-workers", "import time; time.sleep(3600)", nodes=(1, 2))]
    runner = Cluster(make_plan(run_dir, stages, nodes=3), tmp_path, ["gpu008"])
    runner.can_requeue = False
    assert Controller(make_plan(run_dir, stages, nodes=3), runner, say=lambda line: None).run() is Cause.NODE_FAILURE
    assert read_events(run_dir)[-1].node == "gpu008"
